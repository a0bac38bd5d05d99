/*
 * Contents of small files, sent to the page cache before anybody asks (NOTIFY_STORE).
 *
 * Evidence that contents are wanted is a READ in a directory that was listed lately.  Who reads
 * pushed files is not heard, so credit is needed: a READ in a listed directory raises it, the
 * push of a directory spends it, and when it runs low one small file of a directory is left out:
 * its READ says that contents are still wanted.  A walk that only stats never gets credit; one
 * that follows a reading walk spends what was left of its credit, once.
 *
 * The kernel holds the locks of the pages that a READ asks for, and a push of one of them waits,
 * in uninterruptible sleep, for the answer to that READ.  So only one thread may push at a time,
 * never the only one, and never one that holds the lead or another lock.  The push comes before
 * the reply that ends the listing: who listed the directory cannot read from it so soon.  If
 * somebody else does, the rest is not pushed; the last file goes first, because readers begin with
 * the first and would else catch up with us again and again.
 */
#include "backing.h"

#include <sys/stat.h>
#include <unistd.h>

enum {
	MAX_FILE_SIZE = 64 * 1024,
	MAX_DIRECTORY_SIZE = 4 * 1024 * 1024, /* in whole pages, so at most 1024 files */
	PAGE = 4096,
	CREDIT_BY_READ = 8,
	MAX_CREDIT = 256, /* find, grep -r list that many directories before they read */
	LOW_CREDIT = 8, /* from here on leave one file out */
	MAX_FAILURES = 8 /* of a directory: objects not in the page cache, or unknown inodes */
};

/* Does a push make sense on this mount, and can it not block the last thread? */
static bool may_push(const struct cfs_worker *worker)
{
	return worker->config.nr_devices > 1 && !worker->config.is_metadata_only &&
	       !cfs_uses_passthrough(worker);
}

static bool is_pushing(const struct cfs_worker *worker, uint32_t directory)
{
	return __atomic_load_n(&worker->objects->pushed_directory, __ATOMIC_RELAXED) == directory;
}

void cfs_note_reader(struct cfs_thread *thread, uint32_t ino)
{
	struct cfs_worker *worker = thread->worker;

	if (is_pushing(worker, worker->table.parent[ino]))
		__atomic_store_n(&worker->objects->pushed_directory, 0, __ATOMIC_RELAXED);
}

void cfs_note_read(struct cfs_thread *thread, uint32_t ino, uint64_t off, uint32_t size)
{
	struct cfs_worker *worker = thread->worker;
	int32_t *credit = &worker->objects->push_credit;

	if (off || !may_push(worker))
		return;
	/* what was asked for need not be pushed */
	if (size == worker->table.size[ino])
		cfs_set_flag(worker, ino, CFS_FLAG_PUSHED);
	if (cfs_clear_flag(worker, worker->table.parent[ino], CFS_FLAG_LISTED) &&
	    __atomic_load_n(credit, __ATOMIC_RELAXED) <= MAX_CREDIT - CREDIT_BY_READ)
		__atomic_fetch_add(credit, CREDIT_BY_READ, __ATOMIC_RELAXED);
}

void cfs_forget(struct cfs_thread *thread, uint32_t ino)
{
	cfs_clear_flag(thread->worker, ino, CFS_FLAG_PUSHED);
}

static bool is_wanted(const struct cfs_worker *worker, uint32_t ino)
{
	return S_ISREG(worker->table.mode[ino]) && worker->table.size[ino] &&
	       worker->table.size[ino] <= MAX_FILE_SIZE &&
	       !(__atomic_load_n(&worker->inode_flags[ino], __ATOMIC_RELAXED) & CFS_FLAG_PUSHED);
}

/*
 * The contents of a small file, from the image or in thread->data; NULL if they cannot be had
 * without waiting for a disk: the reader can do that as well.
 */
static const uint8_t *contents(struct cfs_thread *thread, uint32_t ino)
{
	const struct cfs_table *table = &thread->worker->table;
	size_t size;
	int fd;

	if (cfs_is_inline(table, ino))
		return cfs_table_bytes(table, table->inline_off[ino]);
	/* not from the cache: once its contents are pushed, the object is not needed again */
	if (cfs_object_open(thread, ino, &fd))
		return NULL;
	size = cfs_object_read_cached(thread, fd, 0, table->size[ino]);
	close(fd);
	return size == table->size[ino] ? thread->data : NULL;
}

static bool push(struct cfs_thread *thread, uint32_t ino)
{
	struct cfs_worker *worker = thread->worker;
	uint32_t size = (uint32_t)worker->table.size[ino];
	struct fuse_notify_store_out head = { .nodeid = ino, .size = size };
	const uint8_t *data = contents(thread, ino);

	if (!data || cfs_notify(thread, FUSE_NOTIFY_STORE, &head, sizeof(head), data, size))
		return false;
	cfs_set_flag(worker, ino, CFS_FLAG_PUSHED);
	cfs_count(&cfs_counters(thread)->pushes, 1);
	cfs_count(&cfs_counters(thread)->pushed_bytes, size);
	return true;
}

/* Push the small files of a directory, the last one first; whether any. */
static bool push_files(struct cfs_thread *thread, uint32_t directory, bool leave_one_out)
{
	const struct cfs_worker *worker = thread->worker;
	const struct cfs_table *table = &worker->table;
	uint64_t dirent = table->dirent_start[directory + 1];
	uint32_t left = MAX_DIRECTORY_SIZE;
	unsigned int nr_failed = 0;
	bool has_pushed = false;

	while (dirent-- > table->dirent_start[directory] && is_pushing(worker, directory)) {
		uint32_t ino = table->dirent_ino[dirent];
		uint32_t size;

		if (!is_wanted(worker, ino))
			continue;
		if (leave_one_out) {
			leave_one_out = false;
			continue;
		}
		size = ((uint32_t)table->size[ino] + PAGE - 1) / PAGE * PAGE;
		if (size > left)
			break;
		left -= size;
		if (push(thread, ino))
			has_pushed = true;
		else if (++nr_failed == MAX_FAILURES)
			break;
	}
	return has_pushed;
}

void cfs_push_directory(struct cfs_thread *thread, uint32_t directory)
{
	struct cfs_worker *worker = thread->worker;
	struct cfs_objects *objects = worker->objects;
	int32_t credit;

	if (!may_push(worker))
		return;
	cfs_set_flag(worker, directory, CFS_FLAG_LISTED);
	credit = __atomic_load_n(&objects->push_credit, __ATOMIC_RELAXED);
	if (credit <= 0 || pthread_mutex_trylock(&objects->push_lock))
		return;
	cfs_hand_over(thread);
	__atomic_store_n(&objects->pushed_directory, directory, __ATOMIC_RELAXED);
	if (push_files(thread, directory, credit <= LOW_CREDIT))
		__atomic_fetch_sub(&objects->push_credit, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&objects->pushed_directory, 0, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&objects->push_lock);
}
