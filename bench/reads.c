/*
 * reads seq|random FILE PROCESSES: read a file through the page cache, print the seconds it took.
 *
 * seq: every process reads all of it in pieces of 1 MiB.  random: the processes share 131,072
 * reads of 4 KiB at aligned random places, the same ones in every run.
 */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20, PAGE = 4096, NR_READS = 131072 };

static char buffer[PIECE];

static void read_all(int fd)
{
	ssize_t size;

	while ((size = read(fd, buffer, PIECE)) > 0)
		;
	if (size < 0)
		err(1, "read");
}

static void read_pages(int fd, uint64_t nr_pages, int process, int nr_reads)
{
	uint64_t state = 88172645463325252u + (uint64_t)process * 2654435761u;

	for (int i = 0; i < nr_reads; i++) {
		/* xorshift64 */
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		if (pread(fd, buffer, PAGE, (off_t)(state % nr_pages * PAGE)) != PAGE)
			err(1, "pread");
	}
}

int main(int argc, char **argv)
{
	int nr_processes = argc == 4 ? atoi(argv[3]) : 0;
	struct timespec start, end;
	struct stat status;
	int is_failed = 0;

	if (nr_processes < 1)
		errx(2, "usage: reads seq|random FILE PROCESSES");
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (int i = 0; i < nr_processes; i++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (pid > 0)
			continue;
		int fd = open(argv[2], O_RDONLY);

		if (fd < 0 || fstat(fd, &status))
			err(1, "%s", argv[2]);
		if (!strcmp(argv[1], "seq"))
			read_all(fd);
		else
			read_pages(fd, (uint64_t)status.st_size / PAGE, i, NR_READS / nr_processes);
		_exit(0);
	}
	for (int status_of, i = 0; i < nr_processes; i++)
		is_failed |= wait(&status_of) < 0 || status_of;
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.6f\n", (double)(end.tv_sec - start.tv_sec) +
				1e-9 * (double)(end.tv_nsec - start.tv_nsec));
	return is_failed;
}
