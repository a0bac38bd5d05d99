/*
 * The data plane: threads that answer a FUSE device from a table, without the interpreter.
 *
 * The lines above "C only" are all that Python sees (read by cfs/fuse/_build.py): plain
 * declarations.
 *
 * Who touches what: a struct cfs_thread belongs to its thread.  Of struct cfs_worker, what
 * create() set never changes; the lead (loop.c), the table of relayed requests (relay.c) and the
 * object descriptors (backing.c) say there how they are shared.  struct cfs_state is shared with
 * the supervisor and with sessions to come: plain loads and stores of __atomic builtins only, and
 * it is consistent wherever a session is killed.
 */
#ifndef CFS_WORKER_H
#define CFS_WORKER_H

#include <stddef.h>
#include <stdint.h>

enum cfs_passthrough { CFS_PASSTHROUGH_OFF, CFS_PASSTHROUGH_ON, CFS_PASSTHROUGH_AUTO };
enum cfs_verify { CFS_VERIFY_OFF, CFS_VERIFY_OPEN, CFS_VERIFY_REQUIRE };

/* All descriptors stay the caller's and outlive the worker. */
struct cfs_config {
	int32_t table_fd;
	int32_t state_fd; /* memfd of struct cfs_state; empty (size 0) before the first session */
	int32_t relay_fd; /* SOCK_SEQPACKET to pyfuse3, or -1: what is not hot gets ENOSYS */
	int32_t event_fd; /* eventfd, written when cfs_worker_events() has news */
	uint32_t nr_devices; /* as many threads; the first is the mount's, the others clones */
	uint32_t nr_object_dirs;
	const int32_t *device_fds; /* non-blocking */
	const int32_t *object_dirs; /* O_PATH, searched in this order */
	uint64_t masked_flags; /* INIT flags (64 bits) not to use: for tests */
	uint32_t passthrough; /* enum cfs_passthrough */
	uint32_t stack_depth; /* with passthrough: 1, or 2 if the objects lie on a stacked file system */
	uint32_t verify; /* enum cfs_verify */
	uint32_t is_metadata_only; /* overlay mode: the contents of objects are not served */
	uint32_t max_poll_us; /* 0: never poll; UINT32_MAX: the default, adaptive */
	uint32_t max_object_fds; /* 0: a default that fits RLIMIT_NOFILE */
};

/* Bits of cfs_worker_events(). */
enum cfs_event {
	CFS_EVENT_SERVING = 1, /* INIT is answered, or was by an earlier session */
	CFS_EVENT_ENDED = 2, /* the connection is gone (unmounted or aborted) */
	CFS_EVENT_LOG = 4, /* cfs_worker_next_log() has lines */
	CFS_EVENT_FAILED = 8 /* cfs_worker_failure() says why; nothing serves */
};

enum cfs_log_reason {
	CFS_LOG_NO_OBJECT, /* a size but no object: EIO */
	CFS_LOG_OPEN, /* the object cannot be opened: error */
	CFS_LOG_SIZE, /* not a regular file, or its size differs: value is its size */
	CFS_LOG_SHORT, /* the object was cut while it was served */
	CFS_LOG_DIGEST, /* contents do not match the digest of the image */
	CFS_LOG_NO_DIGEST, /* verify asked for, but the image records none */
	CFS_LOG_NO_VERITY /* verify=require, but the file has no fs-verity */
};

struct cfs_log_entry {
	uint64_t nid;
	uint64_t value;
	int32_t error; /* errno given to the caller */
	uint32_t reason; /* enum cfs_log_reason */
	char object[160]; /* path below the objects directory, NUL-terminated, cut to fit */
};

enum { CFS_NR_OPCODES = 64 };

struct cfs_counters {
	uint64_t requests[CFS_NR_OPCODES]; /* by opcode; [0]: unknown ones */
	uint64_t replies; /* that the kernel took */
	uint64_t errors; /* replies with an error, negative entries not among them */
	uint64_t relayed;
	uint64_t read_bytes; /* in replies to READ */
	uint64_t object_hits; /* READ, OPEN: the descriptor or backing id was there */
	uint64_t object_misses;
	uint64_t pushes; /* whole files given by NOTIFY_STORE */
	uint64_t pushed_bytes;
	uint64_t names_only; /* directories listed without instantiating files */
	uint64_t invalidations; /* NOTIFY_INVAL_INODE for those */
	uint64_t backing_opens; /* BACKING_OPEN that succeeded */
	uint64_t backing_closes;
	uint64_t verified; /* digests checked */
	uint64_t polls; /* requests found by polling */
	uint64_t sleeps; /* times that nothing came while polling, or that polling was off */
	uint64_t handovers; /* of the lead */
};

/*
 * Head of the state memfd; arrays of internal.h follow.  Survives sessions.
 */
struct cfs_state {
	uint64_t magic; /* written last by the first session */
	uint64_t nr_inodes;
	uint64_t nr_objects;
	uint32_t is_negotiated; /* 1 once INIT was answered; then the next four hold */
	uint32_t minor;
	uint64_t flags; /* INIT flags in use, 64 bits */
	uint32_t max_pages;
	uint32_t use_passthrough;
	uint32_t nr_sessions; /* started so far */
	int32_t session_pid; /* of the one that runs */
	struct cfs_counters counters;
};

struct cfs_worker;

/* The worker, or NULL with a reason in why (NUL-terminated, cut to fit). */
struct cfs_worker *cfs_worker_create(const struct cfs_config *config, char *why, size_t why_size);

/*
 * Start the threads.  If an earlier session was here, first ask the kernel for its unanswered
 * requests (FUSE_NOTIFY_RESEND).  0 or -errno.
 */
int cfs_worker_start(struct cfs_worker *worker);

/* Return and clear the events. */
uint32_t cfs_worker_events(struct cfs_worker *worker);

/* Reason of CFS_EVENT_FAILED, valid as long as the worker. */
const char *cfs_worker_failure(const struct cfs_worker *worker);

/* 1 and the oldest log entry, or 0. */
int cfs_worker_next_log(struct cfs_worker *worker, struct cfs_log_entry *entry);

/*
 * Push no contents from now on; waits for a push under way, so the threads must serve.  For a
 * session that nobody replaces: if it were killed while it pushes, nobody would answer the request
 * that the push may wait for.
 */
void cfs_worker_end_pushes(struct cfs_worker *worker);

/* End all threads and wait for them; then, if it is its time, destroy. */
void cfs_worker_stop(struct cfs_worker *worker);
void cfs_worker_destroy(struct cfs_worker *worker);

/* C only */

#endif
