/*
 * What the files of the worker share.  loop.c: threads, start and end.  lead.c: who reads the
 * device, and when it polls.  replies.c: everything that is written to it.  news.c: events and log
 * lines for Python.  state.c: the state memfd.  ops.c: one function for each opcode.  backing.c:
 * everything that touches objects.  relay.c: what is left goes to pyfuse3.  table.c: the checked
 * table.
 */
#ifndef CFS_INTERNAL_H
#define CFS_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <sys/uio.h>

#include "protocol.h"
#include "table.h"
#include "worker.h"

enum {
	CFS_MAX_THREADS = 16,
	CFS_IN_SIZE = 132 * 1024, /* of a request buffer; max_write is 4096, xattr values 64 KiB */
	CFS_DATA_SIZE = 1024 * 1024, /* of a reply without its header: max_pages 256 */
	CFS_NR_LOG_ENTRIES = 256
};

/* Bits of cfs_worker.inode_flags. */
enum {
	CFS_FLAG_REPORTED = 1, /* a log line was written */
	CFS_FLAG_PUSHED = 2, /* content was pushed, and the inode not forgotten since */
	CFS_FLAG_NAMES_ONLY = 4, /* directory listed in names-only form */
	CFS_FLAG_LISTED = 8 /* directory listed in full, no file of it read since */
};

/* Arrays behind struct cfs_state in the state memfd, each at a multiple of 64. */
struct cfs_backing {
	uint32_t id; /* backing id in the kernel, or 0 */
	uint32_t nr_opens; /* may be too high after a crash, never too low; see passthrough.c */
} __attribute__((aligned(8))); /* one atomic word */

struct cfs_thread {
	struct cfs_worker *worker;
	unsigned int index;
	int fd; /* its device: a reply goes where the request came from */
	bool is_leader;
	pthread_t thread;
	/* The request. in and data are pre-faulted, and locked as far as RLIMIT_MEMLOCK goes. */
	uint8_t *in; /* CFS_IN_SIZE */
	size_t in_size;
	uint8_t *data; /* CFS_DATA_SIZE, page aligned: where replies are put together */
};

struct cfs_lead; /* lead.c */
struct cfs_relay; /* relay.c */
struct cfs_objects; /* backing.c */

struct cfs_worker {
	struct cfs_config config; /* arrays copied */
	struct cfs_table table;
	struct cfs_state *state;
	size_t state_size;
	uint8_t *inode_flags; /* [nr_inodes], in the state memfd */
	struct cfs_backing *backing; /* [nr_inodes], in the state memfd */
	uint64_t *verified; /* [nr_objects], in the state memfd: identity of the file checked, or 0 */
	struct cfs_thread threads[CFS_MAX_THREADS];
	struct cfs_lead *lead;
	struct cfs_relay *relay; /* NULL without */
	struct cfs_objects *objects;
	int stop_fd; /* eventfd: readable when the threads shall end */
	bool is_ending; /* set with it; atomic */
	unsigned int nr_running; /* threads to be joined; of who starts and stops, as the next */
	bool has_ended_pushes; /* we have push_lock, for ever */
	/* news.c */
	uint32_t events;
	char failure[256];
	pthread_mutex_t log_lock;
	struct cfs_log_entry log[CFS_NR_LOG_ENTRIES];
	unsigned int log_start;
	unsigned int log_count;
	/* init.c: the reply to OPEN and OPENDIR is ENOSYS; relaxed atomics, as those below */
	bool no_open;
	bool no_opendir;
	/* names_only.c */
	uint32_t nr_looks; /* at files in directories that were listed in names-only form */
	int32_t nr_full_listings; /* left before directories are listed so again */
};

static inline const struct fuse_in_header *cfs_header(const struct cfs_thread *thread)
{
	return (const struct fuse_in_header *)(const void *)thread->in;
}

/* Argument of a request, behind its header. */
static inline const uint8_t *cfs_argument(const struct cfs_thread *thread)
{
	return thread->in + sizeof(struct fuse_in_header);
}

static inline size_t cfs_argument_size(const struct cfs_thread *thread)
{
	return thread->in_size - sizeof(struct fuse_in_header);
}

static inline void cfs_set_flag(struct cfs_worker *worker, uint32_t ino, uint8_t flag)
{
	if (!(__atomic_load_n(&worker->inode_flags[ino], __ATOMIC_RELAXED) & flag))
		__atomic_fetch_or(&worker->inode_flags[ino], flag, __ATOMIC_RELAXED);
}

/* Whether the flag was set. */
static inline bool cfs_clear_flag(struct cfs_worker *worker, uint32_t ino, uint8_t flag)
{
	if (!(__atomic_load_n(&worker->inode_flags[ino], __ATOMIC_RELAXED) & flag))
		return false;
	return __atomic_fetch_and(&worker->inode_flags[ino], (uint8_t)~flag, __ATOMIC_RELAXED) &
	       flag;
}

static inline void cfs_count(uint64_t *counter, uint64_t by)
{
	__atomic_fetch_add(counter, by, __ATOMIC_RELAXED);
}

static inline struct cfs_counters *cfs_counters(const struct cfs_thread *thread)
{
	return &thread->worker->state->counters;
}

/* ---- state.c ---- */

/* Map the state memfd, which the first session initialises; 0, or -errno with a reason. */
int cfs_state_attach(struct cfs_worker *worker, const char **why);
void cfs_state_detach(struct cfs_worker *worker);

/* ---- lead.c ---- */

int cfs_lead_init(struct cfs_worker *worker);
void cfs_lead_deinit(struct cfs_worker *worker);

/* Wait for the lead and then for a good request; false: the thread shall end, without the lead. */
bool cfs_receive(struct cfs_thread *thread);

/* Let all threads end: now those that wait, the others after their request. */
void cfs_end_threads(struct cfs_worker *worker);

/*
 * Give the lead to a follower, if this thread has it: before anything that may block, and before
 * a push.  Idempotent.
 */
void cfs_hand_over(struct cfs_thread *thread);

/* ---- replies.c ---- */

/* Write a whole message to a device; 0 or -errno. */
int cfs_write_message(struct cfs_worker *worker, int fd, const struct iovec *parts, int nr_parts);

/* The same for a reply, whose first part is its header: if the device refuses it, EIO instead. */
void cfs_write_reply(struct cfs_worker *worker, int fd, const struct iovec *parts, int nr_parts);

/*
 * Reply to the request of the thread.  error: 0 or a positive errno, then without data.  A second
 * part (NULL: none) lets data be sent from where it lies; both parts must be resident.  Exactly
 * one reply for each request; ENOENT and EINTR of the device are dealt with here.
 */
void cfs_reply_error(struct cfs_thread *thread, int error);
void cfs_reply(struct cfs_thread *thread, const void *data, size_t size);
void cfs_reply_parts(struct cfs_thread *thread, const void *first, size_t first_size,
		     const void *second, size_t second_size);

/* Write a notification; 0 or -errno (ENOENT: the kernel does not know the inode). */
int cfs_notify(struct cfs_thread *thread, int32_t code, const void *head, size_t head_size,
	       const void *data, size_t data_size);

/* ---- news.c ---- */

/* Set bits of the events and wake Python. */
void cfs_raise_event(struct cfs_worker *worker, uint32_t events);

/* End serving before it began: CFS_EVENT_FAILED with this reason. */
void cfs_fail(struct cfs_worker *worker, const char *reason);

/* Once for each inode (CFS_FLAG_REPORTED); a full ring drops the line.  Misses only. */
void cfs_log(struct cfs_worker *worker, uint32_t ino, uint32_t reason, int error, uint64_t value);

/* ---- ops.c ---- */

/* Answer the request in thread->in, or relay it.  The request's length has been checked
 * against its header.  FORGET, BATCH_FORGET and INTERRUPT get no reply. */
void cfs_dispatch(struct cfs_thread *thread);

/* What INIT decided, from worker->state; also by a session that never saw INIT. */
void cfs_apply_negotiated(struct cfs_worker *worker);

/* ---- backing.c ---- */

int cfs_objects_init(struct cfs_worker *worker);
void cfs_objects_deinit(struct cfs_worker *worker);

/* After INIT was answered with passthrough: does BACKING_OPEN work? 0 or -errno. */
int cfs_probe_passthrough(struct cfs_worker *worker);

/* Regular files only; node id, offset and size are checked by ops.c (size is cut to the file and
 * to CFS_DATA_SIZE, and not 0). */
void cfs_read(struct cfs_thread *thread, uint32_t ino, uint64_t off, uint32_t size);

/* OPEN and RELEASE when OPEN is not answered ENOSYS. */
void cfs_open(struct cfs_thread *thread, uint32_t ino, uint32_t flags);
void cfs_release(struct cfs_thread *thread, uint32_t ino, uint64_t fh);

/*
 * Small whole files: cfs_push_directory() is called by ops.c before the empty READDIRPLUS reply
 * that ends a directory listed in full; it decides by itself whether reads are being seen.  It
 * may hand the lead over, and overwrites thread->data.
 * cfs_forget() by FORGET of an inode whose lookup count may have become 0.
 */
void cfs_push_directory(struct cfs_thread *thread, uint32_t directory);
void cfs_forget(struct cfs_thread *thread, uint32_t ino);

/* ---- relay.c ---- */

int cfs_relay_init(struct cfs_worker *worker);
void cfs_relay_deinit(struct cfs_worker *worker);

/* Send pyfuse3 its synthetic INIT and start the thread that carries replies back. 0 or -errno. */
int cfs_relay_start(struct cfs_worker *worker);
void cfs_relay_stop(struct cfs_worker *worker);

/* Pass the request on; if that cannot be, reply with an error. */
void cfs_relay_request(struct cfs_thread *thread);

#endif
