/*
 * OPEN and RELEASE, and the backing ids of passthrough.
 *
 * The kernel wants one backing id, and one mode, for all simultaneous opens of an inode, and it
 * keeps ids until they are closed, whatever becomes of us.  So worker->backing[ino] lies in the
 * state memfd.  An open is counted before its reply, a release after it: wherever a session is
 * killed, the count is never too low, and no inode that is open gets another id or mode.  What a
 * crash costs: an id that was registered or taken from the table in that moment stays in the
 * kernel until the unmount, and an inode whose count is too high keeps its id.
 *
 * Opens of an inode that has an id take no lock.
 */
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define SERVED UINT32_MAX /* as id: no backing while the inode is open, READ serves it */

enum {
	MAX_BACKING_IDS = 16384,
	NR_EVICTION_STEPS = 1024, /* of the clock hand at one OPEN */
	NR_PROBES = 16 /* objects to look for */
};

_Static_assert(sizeof(struct cfs_backing) == 8, "one atomic word");

void cfs_passthrough_init(struct cfs_worker *worker)
{
	struct cfs_objects *objects = worker->objects;
	uint64_t ino;

	if (!cfs_uses_passthrough(worker))
		return;
	for (ino = 0; ino < worker->table.nr_inodes; ino++) {
		uint32_t id = worker->backing[ino].id;

		objects->nr_backing_ids += id && id != SERVED;
	}
}

static int open_backing(int device_fd, int fd, uint32_t *id)
{
	struct cfs_backing_map map = { .fd = fd };
	int ret;

	ret = ioctl(device_fd, CFS_DEV_IOC_BACKING_OPEN, &map);
	if (ret < 0)
		return -errno;
	*id = (uint32_t)ret;
	return 0;
}

static int close_backing(int device_fd, uint32_t id)
{
	return ioctl(device_fd, CFS_DEV_IOC_BACKING_CLOSE, &id) ? -errno : 0;
}

int cfs_probe_passthrough(struct cfs_worker *worker)
{
	int device_fd = worker->config.device_fds[0];
	int object_fd = -1;
	uint32_t id = 0;
	uint32_t row;
	int ret;

	for (row = 0; row < worker->table.nr_objects && row < NR_PROBES && object_fd < 0; row++)
		object_fd = cfs_object_open_row(worker, NULL, row);
	ret = open_backing(device_fd, object_fd < 0 ? worker->config.table_fd : object_fd, &id);
	if (object_fd >= 0)
		close(object_fd);
	return ret ? ret : close_backing(device_fd, id);
}

/* Count one more open of an inode whose mode is settled; if it is not, nothing happens. */
static bool add_open(struct cfs_backing *place, struct cfs_backing *now)
{
	struct cfs_backing next;

	__atomic_load(place, now, __ATOMIC_ACQUIRE);
	do {
		if (!now->id || (now->id == SERVED && !now->nr_opens))
			return false;
		next = *now;
		next.nr_opens++;
	} while (!__atomic_compare_exchange(place, now, &next, false, __ATOMIC_ACQ_REL,
					    __ATOMIC_ACQUIRE));
	return true;
}

static void remove_open(struct cfs_backing *place)
{
	struct cfs_backing now, next;

	__atomic_load(place, &now, __ATOMIC_ACQUIRE);
	do {
		if (!now.nr_opens)
			return;
		next = now;
		next.nr_opens--;
	} while (!__atomic_compare_exchange(place, &now, &next, false, __ATOMIC_ACQ_REL,
					    __ATOMIC_ACQUIRE));
}

/*
 * Close one id that is not in use, if there are too many.  It leaves the table first: an id that
 * the kernel keeps in vain is better than one in the table that it does not know.
 */
static void evict_backing(struct cfs_thread *thread)
{
	struct cfs_worker *worker = thread->worker;
	struct cfs_objects *objects = worker->objects;
	const struct cfs_backing none = { 0, 0 };
	unsigned int step;

	for (step = 0; step < NR_EVICTION_STEPS; step++) {
		uint32_t ino = objects->backing_hand;
		struct cfs_backing now, next = none;

		objects->backing_hand = (uint32_t)((ino + 1ull) % worker->table.nr_inodes);
		__atomic_load(&worker->backing[ino], &now, __ATOMIC_RELAXED);
		if (!now.id || now.id == SERVED || now.nr_opens)
			continue;
		if (!__atomic_compare_exchange(&worker->backing[ino], &now, &next, false,
					       __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
			continue;
		objects->nr_backing_ids--;
		if (!close_backing(thread->fd, now.id))
			cfs_count(&cfs_counters(thread)->backing_closes, 1);
		return;
	}
}

/* Settle the mode of an inode, unless another thread just did, and count this open. */
static void settle(struct cfs_thread *thread, uint32_t ino, int fd, struct cfs_backing *now)
{
	struct cfs_worker *worker = thread->worker;
	struct cfs_objects *objects = worker->objects;

	cfs_lock(thread, &objects->backing_lock);
	if (!add_open(&worker->backing[ino], now)) {
		now->nr_opens = 1;
		if (open_backing(thread->fd, fd, &now->id)) {
			now->id = SERVED;
		} else {
			objects->nr_backing_ids++;
			cfs_count(&cfs_counters(thread)->backing_opens, 1);
		}
		__atomic_store(&worker->backing[ino], now, __ATOMIC_RELEASE);
		if (objects->nr_backing_ids > MAX_BACKING_IDS)
			evict_backing(thread);
	}
	pthread_mutex_unlock(&objects->backing_lock);
}

static int get_backing(struct cfs_thread *thread, uint32_t ino, struct cfs_backing *now)
{
	int fd, ret;

	/* what was altered since is found by looking at it again; fs-verity files cannot be */
	if (thread->worker->config.verify != CFS_VERIFY_OPEN &&
	    add_open(&thread->worker->backing[ino], now)) {
		cfs_count(&cfs_counters(thread)->object_hits, 1);
		return 0;
	}
	cfs_count(&cfs_counters(thread)->object_misses, 1);
	ret = cfs_object_open(thread, ino, &fd);
	if (ret)
		return ret;
	settle(thread, ino, fd, now);
	close(fd);
	return 0;
}

/* A file whose bytes are an object: from the kernel, or by READ. */
static int open_object(struct cfs_thread *thread, uint32_t ino, struct cfs_open_out *out)
{
	struct cfs_backing now;
	int fd, ret;

	if (cfs_uses_passthrough(thread->worker)) {
		ret = get_backing(thread, ino, &now);
		if (!ret && now.id != SERVED) {
			out->open_flags = CFS_FOPEN_PASSTHROUGH;
			out->backing_id = (int32_t)now.id;
		}
		return ret;
	}
	/* fail here rather than at the first READ */
	ret = cfs_object_get(thread, ino, &fd);
	if (!ret)
		cfs_object_put(thread);
	return ret;
}

void cfs_open(struct cfs_thread *thread, uint32_t ino, uint32_t flags)
{
	struct cfs_open_out out = { .fh = ino, .open_flags = FOPEN_KEEP_CACHE };
	int ret = 0;

	if (flags & (O_ACCMODE | O_TRUNC))
		ret = -EROFS;
	else if (!cfs_is_inline(&thread->worker->table, ino))
		ret = open_object(thread, ino, &out);
	if (ret)
		cfs_reply_error(thread, -ret);
	else
		cfs_reply(thread, &out, sizeof(out));
}

void cfs_release(struct cfs_thread *thread, uint32_t ino, uint64_t fh)
{
	(void)fh; /* the inode says it all, also to a session that did not open it */
	cfs_reply(thread, NULL, 0);
	if (cfs_uses_passthrough(thread->worker) && !cfs_is_inline(&thread->worker->table, ino))
		remove_open(&thread->worker->backing[ino]);
}
