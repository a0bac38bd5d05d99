// SPDX-License-Identifier: Apache-2.0
/* Preloaded: takes the sync calls out of a program, to prove that a test misses them. */
#include <sys/types.h>

int fsync(int fd)
{
	(void)fd;
	return 0;
}

int fdatasync(int fd)
{
	(void)fd;
	return 0;
}

int syncfs(int fd)
{
	(void)fd;
	return 0;
}

void sync(void)
{
}

int sync_file_range(int fd, off_t offset, off_t nbytes, unsigned int flags)
{
	(void)fd;
	(void)offset;
	(void)nbytes;
	(void)flags;
	return 0;
}
