/*
 * Descriptors of objects, and READ.
 *
 * Descriptors lie in slots, at most max_slots of them; slot_of[row] leads there.  A hit takes no
 * lock: the thread writes the slot into its in_use place and looks at slot_of again.  Who evicts
 * clears slot_of first and looks at all in_use places afterwards; all four are sequentially
 * consistent, so that one of the two always sees the other, and a descriptor in use is not closed.
 *
 * Paths come from the image and may hold anything: the kernel resolves them beneath the objects
 * directories, without any symlink.
 */
#define _GNU_SOURCE
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	DEFAULT_MAX_SLOTS = 16384,
	NR_RETRIES = 64 /* of openat2, while others rename directories */
};

static uint32_t max_slots(const struct cfs_config *config)
{
	uint64_t wanted = config->max_object_fds ? config->max_object_fds : DEFAULT_MAX_SLOTS;
	struct rlimit limit;

	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur / 2 < wanted)
		wanted = limit.rlim_cur / 2;
	/* each thread may hold on to one while another looks for a victim */
	return wanted < CFS_MAX_THREADS ? CFS_MAX_THREADS : (uint32_t)wanted;
}

int cfs_objects_init(struct cfs_worker *worker)
{
	size_t nr_rows = worker->table.nr_objects ? worker->table.nr_objects : 1;
	struct cfs_objects *objects = aligned_alloc(64, (sizeof(*objects) + 63) / 64 * 64);

	if (!objects)
		return -ENOMEM;
	memset(objects, 0, sizeof(*objects));
	objects->max_slots = max_slots(&worker->config);
	objects->slot_of = calloc(nr_rows, sizeof(*objects->slot_of));
	objects->slots = calloc(objects->max_slots, sizeof(*objects->slots));
	if (!objects->slot_of || !objects->slots) {
		free(objects->slot_of);
		free(objects->slots);
		free(objects);
		return -ENOMEM;
	}
	pthread_mutex_init(&objects->lock, NULL);
	pthread_mutex_init(&objects->verify_lock, NULL);
	pthread_cond_init(&objects->verify_done, NULL);
	pthread_mutex_init(&objects->backing_lock, NULL);
	pthread_mutex_init(&objects->push_lock, NULL);
	worker->objects = objects;
	cfs_passthrough_init(worker);
	return 0;
}

void cfs_objects_deinit(struct cfs_worker *worker)
{
	struct cfs_objects *objects = worker->objects;
	uint32_t slot;

	if (!objects)
		return;
	for (slot = 0; slot < objects->nr_slots; slot++)
		close(objects->slots[slot].fd);
	pthread_mutex_destroy(&objects->lock);
	pthread_mutex_destroy(&objects->verify_lock);
	pthread_cond_destroy(&objects->verify_done);
	pthread_mutex_destroy(&objects->backing_lock);
	pthread_mutex_destroy(&objects->push_lock);
	free(objects->slot_of);
	free(objects->slots);
	free(objects);
	worker->objects = NULL;
}

static int open_beneath(int dir_fd, const char *path, uint64_t more_resolve)
{
	struct open_how how = {
		.flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS |
			   more_resolve,
	};
	long fd;

	fd = syscall(SYS_openat2, dir_fd, path, &how, sizeof(how));
	return fd < 0 ? -errno : (int)fd;
}

/*
 * Open below one directory.  What the dentry cache knows is opened at once; for anything else,
 * and before Linux 5.12 (EINVAL), the lead goes to another thread first.
 */
static int open_below(struct cfs_thread *thread, int dir_fd, const char *path)
{
	int tries;
	int fd;

	if (thread && thread->is_leader) {
		fd = open_beneath(dir_fd, path, RESOLVE_CACHED);
		if (fd != -EAGAIN && fd != -EINVAL)
			return fd;
		cfs_hand_over(thread);
	}
	for (tries = 0; tries < NR_RETRIES; tries++) {
		fd = open_beneath(dir_fd, path, 0);
		if (fd != -EAGAIN && fd != -EINTR)
			break;
	}
	return fd == -ENOSYS ? -EOPNOTSUPP : fd;
}

int cfs_object_open_row(struct cfs_worker *worker, struct cfs_thread *thread, uint32_t row)
{
	const struct cfs_table *table = &worker->table;
	uint32_t size = table->object_path_size[row];
	const uint8_t *bytes = cfs_table_bytes(table, table->object_path_off[row]);
	char path[PATH_MAX];
	uint32_t i;
	int fd;

	if (memchr(bytes, 0, size))
		return -ENOENT;
	if (size >= sizeof(path))
		return -ENAMETOOLONG;
	memcpy(path, bytes, size);
	path[size] = '\0';
	for (i = 0; i < worker->config.nr_object_dirs; i++) {
		fd = open_below(thread, worker->config.object_dirs[i], path);
		if (fd != -ENOENT && fd != -ENOTDIR)
			return fd;
	}
	return -ENOENT;
}

static int check_object(struct cfs_thread *thread, uint32_t ino, int fd)
{
	struct cfs_worker *worker = thread->worker;
	struct stat status;

	if (fstat(fd, &status))
		return -errno;
	if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size != worker->table.size[ino]) {
		cfs_log(worker, ino, CFS_LOG_SIZE, EIO, (uint64_t)status.st_size);
		return -EIO;
	}
	if (worker->config.verify == CFS_VERIFY_OFF)
		return 0;
	return cfs_verify(thread, ino, fd, &status);
}

int cfs_object_open(struct cfs_thread *thread, uint32_t ino, int *fd_out)
{
	struct cfs_worker *worker = thread->worker;
	uint32_t row = worker->table.object[ino];
	int fd, ret;

	if (row == CFS_NO_OBJECT || !worker->table.object_path_size[row]) {
		cfs_log(worker, ino, CFS_LOG_NO_OBJECT, EIO, 0);
		return -EIO;
	}
	if (worker->config.is_metadata_only)
		return -EACCES;
	fd = cfs_object_open_row(worker, thread, row);
	if (fd < 0) {
		cfs_log(worker, ino, CFS_LOG_OPEN, -fd, 0);
		return fd;
	}
	ret = check_object(thread, ino, fd);
	if (ret) {
		close(fd);
		return ret;
	}
	*fd_out = fd;
	return 0;
}

/* The slot of a row, protected from eviction, or NULL. */
static struct cfs_slot *find_slot(struct cfs_thread *thread, uint32_t row)
{
	struct cfs_objects *objects = thread->worker->objects;
	uint32_t *in_use = &objects->in_use[thread->index].slot;
	uint32_t slot = __atomic_load_n(&objects->slot_of[row], __ATOMIC_ACQUIRE);

	if (!slot)
		return NULL;
	__atomic_store_n(in_use, slot, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&objects->slot_of[row], __ATOMIC_SEQ_CST) != slot) {
		__atomic_store_n(in_use, 0, __ATOMIC_RELEASE);
		return NULL;
	}
	return &objects->slots[slot - 1];
}

void cfs_object_put(struct cfs_thread *thread)
{
	__atomic_store_n(&thread->worker->objects->in_use[thread->index].slot, 0,
			 __ATOMIC_RELEASE);
}

/* Take a slot from its row, unless a thread uses it. */
static bool try_evict(struct cfs_objects *objects, uint32_t slot)
{
	uint32_t *place = &objects->slot_of[objects->slots[slot].row];
	unsigned int i;

	__atomic_store_n(place, 0, __ATOMIC_SEQ_CST);
	for (i = 0; i < CFS_MAX_THREADS; i++) {
		if (__atomic_load_n(&objects->in_use[i].slot, __ATOMIC_SEQ_CST) != slot + 1)
			continue;
		__atomic_store_n(place, slot + 1, __ATOMIC_SEQ_CST);
		return false;
	}
	return true;
}

/* A slot without a row; its old descriptor, or -1, is for the caller to close. */
static struct cfs_slot *free_slot(struct cfs_objects *objects, int *old_fd)
{
	*old_fd = -1;
	if (objects->nr_slots < objects->max_slots)
		return &objects->slots[objects->nr_slots++];
	/* ends: the others use fewer slots than there are, and stay out of lock for long enough */
	for (;;) {
		uint32_t slot = objects->slot_hand;

		objects->slot_hand = (slot + 1) % objects->max_slots;
		if (__atomic_exchange_n(&objects->slots[slot].was_used, false, __ATOMIC_RELAXED))
			continue;
		if (!try_evict(objects, slot))
			continue;
		*old_fd = objects->slots[slot].fd;
		return &objects->slots[slot];
	}
}

/* Keep a descriptor, or close it if another thread was quicker; the slot is protected. */
static struct cfs_slot *keep_object(struct cfs_thread *thread, uint32_t row, int fd, uint64_t size)
{
	struct cfs_objects *objects = thread->worker->objects;
	struct cfs_slot *slot;
	int old_fd;

	cfs_lock(thread, &objects->lock);
	slot = find_slot(thread, row);
	if (slot) {
		old_fd = fd;
	} else {
		slot = free_slot(objects, &old_fd);
		slot->row = row;
		slot->fd = fd;
		slot->size = size;
		__atomic_store_n(&objects->slot_of[row], (uint32_t)(slot - objects->slots) + 1,
				 __ATOMIC_SEQ_CST);
		find_slot(thread, row);
	}
	pthread_mutex_unlock(&objects->lock);
	if (old_fd >= 0)
		close(old_fd);
	return slot;
}

int cfs_object_get(struct cfs_thread *thread, uint32_t ino, int *fd_out)
{
	struct cfs_worker *worker = thread->worker;
	uint32_t row = worker->table.object[ino];
	struct cfs_slot *slot = row == CFS_NO_OBJECT ? NULL : find_slot(thread, row);

	if (slot) {
		int ret = 0;

		cfs_count(&cfs_counters(thread)->object_hits, 1);
		if (!__atomic_load_n(&slot->was_used, __ATOMIC_RELAXED))
			__atomic_store_n(&slot->was_used, true, __ATOMIC_RELAXED);
		if (worker->config.verify == CFS_VERIFY_OPEN) /* altered since? */
			ret = check_object(thread, ino, slot->fd);
		if (ret) {
			cfs_object_put(thread);
			return ret;
		}
	} else {
		int fd, ret;

		cfs_count(&cfs_counters(thread)->object_misses, 1);
		ret = cfs_object_open(thread, ino, &fd);
		if (ret)
			return ret;
		slot = keep_object(thread, row, fd, worker->table.size[ino]);
	}
	/* two inodes of an image may name one object with different sizes */
	if (slot->size != worker->table.size[ino]) {
		cfs_log(worker, ino, CFS_LOG_SIZE, EIO, slot->size);
		cfs_object_put(thread);
		return -EIO;
	}
	*fd_out = slot->fd;
	return 0;
}

size_t cfs_object_read_cached(struct cfs_thread *thread, int fd, uint64_t off, size_t size)
{
	struct iovec part = { thread->data, size };
	ssize_t nr_read = preadv2(fd, &part, 1, (off_t)off, RWF_NOWAIT);

	/* tmpfs does not know RWF_NOWAIT, but has no disk to wait for; another may let us wait */
	if (nr_read < 0 && errno == EOPNOTSUPP && !thread->is_leader)
		nr_read = pread(fd, thread->data, size, (off_t)off);
	return nr_read < 0 ? 0 : (size_t)nr_read;
}

/* Read into thread->data, all of it: -ENODATA if the file ends before, or -errno. */
static int read_all(struct cfs_thread *thread, int fd, uint64_t off, size_t size)
{
	size_t done = 0;

	if (thread->is_leader) {
		done = cfs_object_read_cached(thread, fd, off, size);
		if (done < size)
			cfs_hand_over(thread);
	}
	while (done < size) {
		ssize_t nr_read;

		nr_read = pread(fd, thread->data + done, size - done, (off_t)(off + done));
		if (nr_read == 0)
			return -ENODATA;
		if (nr_read > 0)
			done += (size_t)nr_read;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int read_object(struct cfs_thread *thread, uint32_t ino, uint64_t off, uint32_t size)
{
	int fd, ret;

	ret = cfs_object_get(thread, ino, &fd);
	if (ret)
		return ret;
	ret = read_all(thread, fd, off, size);
	cfs_object_put(thread);
	if (ret == -ENODATA) {
		cfs_log(thread->worker, ino, CFS_LOG_SHORT, EIO, 0);
		return -EIO;
	}
	return ret;
}

void cfs_read(struct cfs_thread *thread, uint32_t ino, uint64_t off, uint32_t size)
{
	const struct cfs_table *table = &thread->worker->table;
	const uint8_t *data = thread->data;

	cfs_note_reader(thread, ino);
	if (cfs_is_inline(table, ino)) {
		data = cfs_table_bytes(table, table->inline_off[ino]) + off;
	} else {
		int ret = read_object(thread, ino, off, size);

		if (ret) {
			cfs_reply_error(thread, -ret);
			return;
		}
	}
	cfs_count(&cfs_counters(thread)->read_bytes, size);
	cfs_reply_parts(thread, data, size, NULL, 0);
	cfs_note_read(thread, ino, off, size);
}
