/*
 * Listings without attributes of files, until somebody looks (spec fuse-data-plane 4).
 *
 * The kernel makes an inode for each entry that READDIRPLUS describes, which costs "find" more than
 * all the rest.  So directories are listed in names-only form: subdirectories are described,
 * everything else is but named.  A LOOKUP of a file in such a directory shows that files are
 * looked at; then the next 64 directories are listed in full, after the next such LOOKUP 2048, and
 * so on.  The kernel caches listings, and would ask for each file of those in names-only form: it
 * is made to forget them.  Not that of the directory itself and those above it: a walk that is in
 * the middle of them knows their names already, and leaves all of their files in the cache.
 *
 * Shared by all threads: the CFS_FLAG_NAMES_ONLY bits, worker->nr_looks and
 * worker->nr_full_listings, all of them relaxed atomics.  A listing that is under way while the
 * bits are collected may stay in the kernel in names-only form; that costs time, nothing else.
 *
 * The kernel holds the lock of a page of a cached listing while it copies to the caller's memory,
 * which may be a file that we serve, or one that never comes.  An invalidation waits for it, in
 * uninterruptible sleep: so it keeps to the rules of push.c, and takes the same lock.
 */
#include "ops.h"
#include "backing.h"

enum { FIRST_GRANT_BITS = 6, GRANT_BITS = 5, MAX_GRANT_BITS = 20, MAX_DEPTH = 2048 };

/* Take one of the listings that are to be full; the count may fall a little below 0. */
static bool take_full_listing(struct cfs_worker *worker)
{
	return __atomic_load_n(&worker->nr_full_listings, __ATOMIC_RELAXED) > 0 &&
	       __atomic_fetch_sub(&worker->nr_full_listings, 1, __ATOMIC_RELAXED) > 0;
}

bool cfs_is_names_only(struct cfs_thread *thread, uint32_t directory, uint64_t off)
{
	struct cfs_worker *worker = thread->worker;

	if (off)
		return __atomic_load_n(&worker->inode_flags[directory], __ATOMIC_RELAXED) &
		       CFS_FLAG_NAMES_ONLY;
	if (!take_full_listing(worker))
		return true;
	cfs_clear_flag(worker, directory, CFS_FLAG_NAMES_ONLY);
	return false;
}

void cfs_note_names_only(struct cfs_thread *thread, uint32_t directory)
{
	uint8_t before = __atomic_fetch_or(&thread->worker->inode_flags[directory],
					   CFS_FLAG_NAMES_ONLY, __ATOMIC_RELAXED);

	if (!(before & CFS_FLAG_NAMES_ONLY))
		cfs_count(&cfs_counters(thread)->names_only, 1);
}

static void grant_full_listings(struct cfs_worker *worker)
{
	uint32_t nr_looks = __atomic_fetch_add(&worker->nr_looks, 1, __ATOMIC_RELAXED);
	uint32_t bits = MAX_GRANT_BITS;

	if (nr_looks < (MAX_GRANT_BITS - FIRST_GRANT_BITS) / GRANT_BITS)
		bits = FIRST_GRANT_BITS + GRANT_BITS * nr_looks;
	__atomic_store_n(&worker->nr_full_listings, 1 << bits, __ATOMIC_RELAXED);
}

/* Let the kernel forget a listing. */
static void invalidate(struct cfs_thread *thread, uint32_t directory)
{
	const struct fuse_notify_inval_inode_out out = { .ino = directory };

	if (!cfs_notify(thread, FUSE_NOTIFY_INVAL_INODE, &out, sizeof(out), NULL, 0))
		cfs_count(&cfs_counters(thread)->invalidations, 1);
}

/* Let the kernel forget the listings in names-only form but for a directory and those above it. */
static void invalidate_others(struct cfs_thread *thread, uint32_t directory)
{
	struct cfs_worker *worker = thread->worker;
	unsigned int depth = 0;

	for (; directory != CFS_ROOT && depth < MAX_DEPTH; depth++) {
		directory = worker->table.parent[directory];
		cfs_clear_flag(worker, directory, CFS_FLAG_NAMES_ONLY);
	}
	for (uint64_t ino = CFS_ROOT; ino < worker->table.nr_inodes; ino++)
		if (cfs_clear_flag(worker, (uint32_t)ino, CFS_FLAG_NAMES_ONLY))
			invalidate(thread, (uint32_t)ino);
}

void cfs_note_look(struct cfs_thread *thread, uint32_t directory)
{
	struct cfs_worker *worker = thread->worker;

	if (!cfs_clear_flag(worker, directory, CFS_FLAG_NAMES_ONLY))
		return;
	grant_full_listings(worker);
	if (worker->config.nr_devices < 2 ||
	    pthread_mutex_trylock(&worker->objects->push_lock))
		return;
	cfs_hand_over(thread);
	invalidate_others(thread, directory);
	pthread_mutex_unlock(&worker->objects->push_lock);
}
