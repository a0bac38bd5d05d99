/*
 * INIT: what is agreed with the kernel, for as long as the mount lives (spec fuse-data-plane 2).
 *
 * The agreement lies in the state memfd before the kernel hears of it: if this session is killed
 * in between, the next one knows it, and answers INIT once more if the kernel sends it again.
 */
#include "ops.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
	MIN_MINOR = 31, /* what libfuse speaks too */
	MAX_PAGES_BEFORE_7_28 = 32,
	MAX_WRITE = 4096, /* the least there is; nothing is ever written */
	MAX_READAHEAD = 1024 * 1024,
	MAX_BACKGROUND = 256,
	CONGESTION = 192
};

#define WANTED                                                                                   \
	((uint64_t)FUSE_ASYNC_READ | FUSE_DO_READDIRPLUS | FUSE_NO_OPEN_SUPPORT |                \
	 FUSE_PARALLEL_DIROPS | FUSE_ABORT_ERROR | FUSE_MAX_PAGES | FUSE_CACHE_SYMLINKS |        \
	 FUSE_NO_OPENDIR_SUPPORT | FUSE_EXPLICIT_INVAL_DATA | FUSE_INIT_EXT | CFS_INIT_NO_EXPORT | \
	 CFS_INIT_HAS_RESEND)

/* What of this kernel's offer is used. */
static uint64_t choose_flags(const struct cfs_thread *thread)
{
	const struct cfs_worker *worker = thread->worker;
	const struct fuse_init_in *in = CFS_ARGUMENT(thread, struct fuse_init_in);
	uint64_t offered = in->flags, flags = WANTED;

	if (in->flags & FUSE_INIT_EXT &&
	    cfs_argument_size(thread) >= offsetof(struct fuse_init_in, unused))
		offered |= (uint64_t)in->flags2 << 32;
	if (worker->config.passthrough != CFS_PASSTHROUGH_OFF)
		flags |= CFS_INIT_PASSTHROUGH;
	if (worker->table.has_acl)
		flags |= FUSE_POSIX_ACL;
	flags &= offered & ~worker->config.masked_flags;
	/* the upper half counts only with this one */
	return flags & FUSE_INIT_EXT ? flags : (uint32_t)flags;
}

/* Of the machine's size, that a reply can hold. */
static uint16_t most_pages(void)
{
	return (uint16_t)(CFS_DATA_SIZE / sysconf(_SC_PAGESIZE));
}

static void publish(struct cfs_worker *worker, uint32_t minor, uint64_t flags)
{
	struct cfs_state *state = worker->state;
	uint32_t max_pages = flags & FUSE_MAX_PAGES ? most_pages() : MAX_PAGES_BEFORE_7_28;

	__atomic_store_n(&state->minor, minor, __ATOMIC_RELAXED);
	__atomic_store_n(&state->flags, flags, __ATOMIC_RELAXED);
	__atomic_store_n(&state->max_pages, max_pages, __ATOMIC_RELAXED);
	__atomic_store_n(&state->use_passthrough, 0, __ATOMIC_RELAXED); /* not proved yet */
	__atomic_store_n(&state->is_negotiated, 1, __ATOMIC_RELEASE);
	cfs_apply_negotiated(worker);
}

void cfs_apply_negotiated(struct cfs_worker *worker)
{
	uint64_t flags = __atomic_load_n(&worker->state->flags, __ATOMIC_RELAXED);
	bool use_passthrough = __atomic_load_n(&worker->state->use_passthrough, __ATOMIC_RELAXED);
	bool no_open = flags & FUSE_NO_OPEN_SUPPORT && !use_passthrough;
	bool no_opendir = flags & FUSE_NO_OPENDIR_SUPPORT;

	__atomic_store_n(&worker->no_open, no_open, __ATOMIC_RELAXED);
	__atomic_store_n(&worker->no_opendir, no_opendir, __ATOMIC_RELAXED);
}

static void reply(struct cfs_thread *thread, uint32_t minor, uint64_t flags)
{
	const struct fuse_init_in *in = CFS_ARGUMENT(thread, struct fuse_init_in);
	struct cfs_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = minor,
		.max_readahead = in->max_readahead < MAX_READAHEAD ? in->max_readahead :
								     MAX_READAHEAD,
		.flags = (uint32_t)flags,
		.flags2 = (uint32_t)(flags >> 32),
		.max_background = MAX_BACKGROUND,
		.congestion_threshold = CONGESTION,
		.max_write = MAX_WRITE,
		.time_gran = 1,
		.max_pages = flags & FUSE_MAX_PAGES ? most_pages() : 0,
	};

	if (flags & CFS_INIT_PASSTHROUGH)
		out.max_stack_depth = thread->worker->config.stack_depth;
	cfs_reply(thread, &out, sizeof(out));
}

static void fail(struct cfs_thread *thread, const char *reason)
{
	cfs_reply_error(thread, EPROTO);
	cfs_fail(thread->worker, reason);
}

static void fail_passthrough(struct cfs_worker *worker, int error)
{
	char reason[128];

	if (error == EPERM)
		cfs_fail(worker, "passthrough: needs the capability CAP_SYS_ADMIN outside of any "
				 "user namespace");
	else if (error == ELOOP)
		cfs_fail(worker, "passthrough: the objects lie on a stacked file system");
	else {
		snprintf(reason, sizeof(reason), "passthrough: %s", strerror(error));
		cfs_fail(worker, reason);
	}
}

/* Use passthrough if it works here; false if it does not, but must. */
static bool try_passthrough(struct cfs_worker *worker)
{
	int error = cfs_probe_passthrough(worker);

	if (!error) {
		__atomic_store_n(&worker->state->use_passthrough, 1, __ATOMIC_RELAXED);
		cfs_apply_negotiated(worker);
		return true;
	}
	if (worker->config.passthrough == CFS_PASSTHROUGH_AUTO)
		return true;
	fail_passthrough(worker, -error);
	return false;
}

void cfs_answer_init(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_init_in *in = CFS_ARGUMENT(thread, struct fuse_init_in);
	struct cfs_worker *worker = thread->worker;
	uint32_t minor = in->minor < CFS_FUSE_MINOR ? in->minor : CFS_FUSE_MINOR;
	uint64_t flags = choose_flags(thread);

	(void)ino;
	if (in->major != FUSE_KERNEL_VERSION || minor < MIN_MINOR) {
		fail(thread, "the kernel's FUSE protocol is not 7.31 or newer (Linux 5.4 or newer)");
		return;
	}
	if (worker->config.passthrough == CFS_PASSTHROUGH_ON && !(flags & CFS_INIT_PASSTHROUGH)) {
		fail(thread, "passthrough: the kernel does not offer it (Linux 6.9 or newer does)");
		return;
	}
	publish(worker, minor, flags);
	reply(thread, minor, flags);
	if (!(flags & CFS_INIT_PASSTHROUGH) || try_passthrough(worker))
		cfs_raise_event(worker, CFS_EVENT_SERVING);
}
