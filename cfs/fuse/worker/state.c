/*
 * The state memfd: struct cfs_state and the arrays of internal.h, shared by the sessions of a mount
 * one after the other, and read by the supervisor.  An empty memfd is the first session's; one that
 * was killed before it wrote the magic left zeros.
 */
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define STATE_MAGIC 0x3165746174736663ull /* "cfstate1" */

static size_t aligned(uint64_t size)
{
	return (size_t)((size + 63) & ~(uint64_t)63);
}

static int check_state(const struct cfs_worker *worker, const char **why)
{
	const struct cfs_state *state = worker->state;
	uint64_t magic = __atomic_load_n(&state->magic, __ATOMIC_ACQUIRE);

	if (magic == 0)
		return 0;
	*why = "state memfd: made by another version";
	if (magic != STATE_MAGIC)
		return -EINVAL;
	*why = "state memfd: belongs to another image";
	if (state->nr_inodes != worker->table.nr_inodes ||
	    state->nr_objects != worker->table.nr_objects)
		return -EINVAL;
	return 0;
}

static int check_size(int fd, size_t expected, const char **why)
{
	struct stat status;

	*why = "state memfd: cannot be used";
	if (fstat(fd, &status) < 0)
		return -errno;
	if (status.st_size == 0)
		return ftruncate(fd, (off_t)expected) < 0 ? -errno : 0;
	*why = "state memfd: belongs to another image";
	return (uint64_t)status.st_size == expected ? 0 : -EINVAL;
}

int cfs_state_attach(struct cfs_worker *worker, const char **why)
{
	size_t flags_off = aligned(sizeof(struct cfs_state));
	size_t backing_off = flags_off + aligned(worker->table.nr_inodes);
	size_t verified_off =
		backing_off + aligned(worker->table.nr_inodes * sizeof(*worker->backing));
	size_t size =
		verified_off + aligned(worker->table.nr_objects * sizeof(*worker->verified));
	int fd = worker->config.state_fd;
	uint8_t *map;
	int ret;

	ret = check_size(fd, size, why);
	if (ret)
		return ret;
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	*why = "state memfd: cannot be mapped";
	if (map == MAP_FAILED)
		return -errno;
	worker->state_size = size;
	worker->state = (struct cfs_state *)(void *)map;
	worker->inode_flags = map + flags_off;
	worker->backing = (struct cfs_backing *)(void *)(map + backing_off);
	worker->verified = (uint64_t *)(void *)(map + verified_off);
	ret = check_state(worker, why);
	if (ret)
		return ret;
	worker->state->nr_inodes = worker->table.nr_inodes;
	worker->state->nr_objects = worker->table.nr_objects;
	__atomic_store_n(&worker->state->magic, STATE_MAGIC, __ATOMIC_RELEASE);
	return 0;
}

void cfs_state_detach(struct cfs_worker *worker)
{
	if (worker->state)
		munmap(worker->state, worker->state_size);
}
