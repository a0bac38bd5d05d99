/*
 * Digests of objects (verify=open, verify=require).
 *
 * A checked file is remembered in the state memfd by what identifies it and changes with it:
 * device, inode and change time.  Another file in its place, or the same one altered, is checked
 * again when it is opened next.  Misses only.
 */
#include "backing.h"

#include <errno.h>
#include <libfsverity.h>
#include <linux/fsverity.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK_SIZE = 4096 };

/* Where a computation reads: ahead, into the buffer of its thread. */
struct reader {
	struct cfs_thread *thread;
	int fd;
	uint64_t off;
	size_t start;
	size_t end;
};

/* Finalizer of splitmix64: every bit of the input changes half of the bits of the output. */
static uint64_t mix(uint64_t value)
{
	value ^= value >> 30;
	value *= 0xbf58476d1ce4e5b9u;
	value ^= value >> 27;
	value *= 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

static uint64_t identity(const struct stat *status)
{
	uint64_t value = mix((uint64_t)status->st_dev + 1);

	value = mix(value ^ (uint64_t)status->st_ino);
	value = mix(value ^ (uint64_t)status->st_ctim.tv_sec);
	value = mix(value ^ (uint64_t)status->st_ctim.tv_nsec);
	return value ? value : 1;
}

/* 0, or -errno; -EIO at the end of the file. */
static int fill(struct reader *reader)
{
	ssize_t nr_read;

	if (__atomic_load_n(&reader->thread->worker->is_ending, __ATOMIC_RELAXED))
		return -EINTR;
	do {
		nr_read = pread(reader->fd, reader->thread->data, CFS_DATA_SIZE,
				(off_t)reader->off);
	} while (nr_read < 0 && errno == EINTR);
	if (nr_read <= 0)
		return nr_read ? -errno : -EIO;
	reader->off += (uint64_t)nr_read;
	reader->start = 0;
	reader->end = (size_t)nr_read;
	return 0;
}

static int read_ahead(void *context, void *out, size_t count)
{
	struct reader *reader = context;
	uint8_t *next = out;

	while (count) {
		size_t size = reader->end - reader->start;

		if (!size) {
			int ret = fill(reader);

			if (ret)
				return ret;
			continue;
		}
		if (size > count)
			size = count;
		memcpy(next, reader->thread->data + reader->start, size);
		reader->start += size;
		next += size;
		count -= size;
	}
	return 0;
}

static uint32_t algorithm(size_t digest_size)
{
	return digest_size == 64 ? FS_VERITY_HASH_ALG_SHA512 : FS_VERITY_HASH_ALG_SHA256;
}

static int compute(struct cfs_thread *thread, int fd, uint64_t file_size, uint8_t *digest,
		   size_t digest_size)
{
	struct libfsverity_merkle_tree_params params = {
		.version = 1,
		.hash_algorithm = algorithm(digest_size),
		.file_size = file_size,
		.block_size = BLOCK_SIZE,
	};
	struct reader reader = { .thread = thread, .fd = fd };
	struct libfsverity_digest *result = NULL;
	int ret;

	ret = libfsverity_compute_digest(&reader, read_ahead, &params, &result);
	if (ret)
		return ret;
	memcpy(digest, result->digest, digest_size);
	free(result);
	return 0;
}

/* The kernel's own digest: 0, or -errno if the file has none; -EILSEQ: of another algorithm. */
static int measure(int fd, uint8_t digest[CFS_DIGEST_MAX], size_t digest_size)
{
	_Alignas(struct fsverity_digest) uint8_t buffer[sizeof(struct fsverity_digest) +
							CFS_DIGEST_MAX] = { 0 };
	struct fsverity_digest *result = (struct fsverity_digest *)(void *)buffer;

	result->digest_size = CFS_DIGEST_MAX;
	if (ioctl(fd, FS_IOC_MEASURE_VERITY, result))
		return -errno;
	/* of the same file: it tells nothing of the one that the image records */
	if (result->digest_algorithm != algorithm(digest_size) ||
	    result->digest_size != digest_size)
		return -EILSEQ;
	memcpy(digest, result->digest, digest_size);
	return 0;
}

static int check(struct cfs_thread *thread, uint32_t ino, int fd)
{
	struct cfs_worker *worker = thread->worker;
	uint32_t row = worker->table.object[ino];
	const uint8_t *expected = worker->table.object_digest + (size_t)row * CFS_DIGEST_MAX;
	size_t digest_size = worker->table.object_digest_size[row];
	uint8_t digest[CFS_DIGEST_MAX];
	int ret;

	ret = measure(fd, digest, digest_size);
	if (ret && worker->config.verify == CFS_VERIFY_REQUIRE) {
		cfs_log(worker, ino, ret == -EILSEQ ? CFS_LOG_DIGEST : CFS_LOG_NO_VERITY, EIO,
			(uint64_t)-ret);
		return -EIO;
	}
	if (ret)
		ret = compute(thread, fd, worker->table.size[ino], digest, digest_size);
	if (ret == -EINTR || ret == -ENOMEM)
		return ret;
	cfs_count(&cfs_counters(thread)->verified, 1);
	if (ret || memcmp(digest, expected, digest_size)) {
		cfs_log(worker, ino, CFS_LOG_DIGEST, EIO, (uint64_t)-ret);
		return -EIO;
	}
	return 0;
}

static bool is_verifying(const struct cfs_objects *objects, uint32_t row)
{
	unsigned int i;

	for (i = 0; i < CFS_MAX_THREADS; i++) {
		if (objects->verifying[i] == row + 1)
			return true;
	}
	return false;
}

/* Wait while another thread checks the row; then, unless that settled it, it is our turn. */
static bool begin_check(struct cfs_thread *thread, uint32_t row, uint64_t file)
{
	struct cfs_objects *objects = thread->worker->objects;
	bool is_checked;

	pthread_mutex_lock(&objects->verify_lock);
	while (is_verifying(objects, row))
		pthread_cond_wait(&objects->verify_done, &objects->verify_lock);
	is_checked = __atomic_load_n(&thread->worker->verified[row], __ATOMIC_RELAXED) == file;
	if (!is_checked)
		objects->verifying[thread->index] = row + 1;
	pthread_mutex_unlock(&objects->verify_lock);
	return !is_checked;
}

static void end_check(struct cfs_thread *thread)
{
	struct cfs_objects *objects = thread->worker->objects;

	pthread_mutex_lock(&objects->verify_lock);
	objects->verifying[thread->index] = 0;
	pthread_cond_broadcast(&objects->verify_done);
	pthread_mutex_unlock(&objects->verify_lock);
}

static bool is_before(const struct timespec *one, const struct timespec *other)
{
	return one->tv_sec < other->tv_sec ||
	       (one->tv_sec == other->tv_sec && one->tv_nsec < other->tv_nsec);
}

int cfs_verify(struct cfs_thread *thread, uint32_t ino, int fd, const struct stat *status)
{
	struct cfs_worker *worker = thread->worker;
	uint32_t row = worker->table.object[ino];
	uint64_t file = identity(status);
	struct timespec now;
	int ret;

	if (!worker->table.object_digest_size[row]) {
		cfs_log(worker, ino, CFS_LOG_NO_DIGEST, EIO, 0);
		return -EIO;
	}
	if (__atomic_load_n(&worker->verified[row], __ATOMIC_RELAXED) == file)
		return 0;
	cfs_hand_over(thread);
	if (!begin_check(thread, row, file))
		return 0;
	clock_gettime(CLOCK_REALTIME_COARSE, &now);
	ret = check(thread, ino, fd);
	/* a change within one tick of the clock leaves no trace: such a file is checked again */
	if (!ret && is_before(&status->st_ctim, &now))
		__atomic_store_n(&worker->verified[row], file, __ATOMIC_RELAXED);
	end_check(thread);
	return ret;
}
