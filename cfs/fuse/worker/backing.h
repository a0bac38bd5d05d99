/*
 * What the files that touch objects share.  backing.c: descriptors and READ.  verify.c: digests.
 * passthrough.c: OPEN, RELEASE and backing ids.  push.c: contents sent before they are asked for.
 */
#ifndef CFS_BACKING_H
#define CFS_BACKING_H

#include <sys/stat.h>

#include "internal.h"

/* An open object.  Changed under objects->lock only, while no thread protects the slot. */
struct cfs_slot {
	uint64_t size; /* of the file */
	uint32_t row;
	int fd;
	bool was_used; /* since the clock hand came by; atomic */
};

/* The slot that a thread uses, plus 1, or 0; each in a cache line of its own. */
struct cfs_protected_slot {
	uint32_t slot;
	uint8_t padding[60];
};

struct cfs_objects {
	struct cfs_protected_slot in_use[CFS_MAX_THREADS];

	/* Object descriptors: lock guards all changes; hits look without it (backing.c). */
	pthread_mutex_t lock;
	uint32_t *slot_of; /* [nr_objects]: slot plus 1, or 0; atomic */
	struct cfs_slot *slots;
	uint32_t max_slots;
	uint32_t nr_slots; /* in use; they never shrink */
	uint32_t slot_hand;

	/* Digests being checked, row plus 1 by thread: under verify_lock, not held meanwhile. */
	pthread_mutex_t verify_lock;
	pthread_cond_t verify_done;
	uint32_t verifying[CFS_MAX_THREADS];

	/* Backing ids: backing_lock guards making and closing them; counts are atomic. */
	pthread_mutex_t backing_lock;
	uint32_t nr_backing_ids;
	uint32_t backing_hand;

	/* Held while a notification may wait: one thread at a time, see push.c, names_only.c. */
	pthread_mutex_t push_lock;
	int32_t push_credit; /* atomic */
	uint32_t pushed_directory; /* now; 0: none, or somebody reads there; atomic */
};

static inline bool cfs_is_inline(const struct cfs_table *table, uint32_t ino)
{
	return table->inline_size[ino] == table->size[ino];
}

/* Decided by INIT, for as long as the mount lives. */
static inline bool cfs_uses_passthrough(const struct cfs_worker *worker)
{
	return __atomic_load_n(&worker->state->use_passthrough, __ATOMIC_RELAXED);
}

/* Take a lock; only if it is taken already does the lead go to another thread. */
static inline void cfs_lock(struct cfs_thread *thread, pthread_mutex_t *lock)
{
	if (!pthread_mutex_trylock(lock))
		return;
	cfs_hand_over(thread);
	pthread_mutex_lock(lock);
}

/* ---- backing.c ---- */

/*
 * Open the object of an inode, and check its type, its size and, if the mount demands it, its
 * digest.  0 and a descriptor that is the caller's, or -errno, logged.
 */
int cfs_object_open(struct cfs_thread *thread, uint32_t ino, int *fd);

/* The object of a row, unchecked: a descriptor or -errno.  thread: NULL if it may block. */
int cfs_object_open_row(struct cfs_worker *worker, struct cfs_thread *thread, uint32_t row);

/* The same from the cache; good until cfs_object_put(), one at a time for each thread. */
int cfs_object_get(struct cfs_thread *thread, uint32_t ino, int *fd);
void cfs_object_put(struct cfs_thread *thread);

/* Read into thread->data what the page cache has, without waiting: its size, maybe 0. */
size_t cfs_object_read_cached(struct cfs_thread *thread, int fd, uint64_t off, size_t size);

/* ---- verify.c ---- */

/* Does the file hold what the image says? 0 or -errno, logged. */
int cfs_verify(struct cfs_thread *thread, uint32_t ino, int fd, const struct stat *status);

/* ---- passthrough.c ---- */

/* Count the backing ids that earlier sessions left. */
void cfs_passthrough_init(struct cfs_worker *worker);

/* ---- push.c ---- */

/* A READ came; a READ was answered. */
void cfs_note_reader(struct cfs_thread *thread, uint32_t ino);
void cfs_note_read(struct cfs_thread *thread, uint32_t ino, uint64_t off, uint32_t size);

#endif
