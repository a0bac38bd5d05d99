/*
 * The list of operations, and those on single inodes.
 *
 * The table was checked when it was attached; of a request, everything is checked here: argument
 * size and node id for all operations in cfs_dispatch(), the rest by each.
 */
#define _GNU_SOURCE
#include "ops.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	BLOCK_SIZE = 4096,
	SECTORS_PER_BLOCK = BLOCK_SIZE / 512,
	NSEC_PER_SEC = 1000000000,
	ENTRY_DEFAULT_VALID = 300 /* pyfuse3's, where nothing else was said */
};

/* The nanoseconds of an image may exceed a second, and the last second that there is. */
static void fill_times(const struct cfs_table *table, uint32_t ino, struct fuse_attr *attr)
{
	uint32_t nsec = table->mtime_nsec[ino];
	int64_t sec;

	if (__builtin_add_overflow(table->mtime_sec[ino], (int64_t)(nsec / NSEC_PER_SEC), &sec)) {
		sec = INT64_MAX;
		nsec = NSEC_PER_SEC - 1;
	}
	attr->atime = attr->mtime = attr->ctime = (uint64_t)sec;
	attr->atimensec = attr->mtimensec = attr->ctimensec = nsec % NSEC_PER_SEC;
}

static void fill_attr(const struct cfs_table *table, uint32_t ino, struct fuse_attr *attr)
{
	uint64_t size = table->size[ino];

	attr->ino = ino;
	attr->size = size;
	attr->blocks = 0;
	if (S_ISREG(table->mode[ino]))
		attr->blocks = (size + BLOCK_SIZE - 1) / BLOCK_SIZE * SECTORS_PER_BLOCK;
	fill_times(table, ino, attr);
	attr->mode = table->mode[ino];
	attr->nlink = table->nlink[ino];
	attr->uid = table->uid[ino];
	attr->gid = table->gid[ino];
	attr->rdev = table->rdev[ino];
	attr->blksize = BLOCK_SIZE;
	attr->flags = 0;
}

void cfs_fill_entry(const struct cfs_table *table, uint32_t ino, struct fuse_entry_out *entry)
{
	entry->nodeid = ino;
	entry->generation = 0;
	entry->entry_valid = entry->attr_valid = CFS_FOREVER;
	entry->entry_valid_nsec = entry->attr_valid_nsec = CFS_FOREVER_NSEC;
	fill_attr(table, ino, &entry->attr);
}

/* A name that does not exist, to be cached too.  The kernel reads no more than the first line. */
static const struct fuse_entry_out negative_entry = {
	.nodeid = 0, .entry_valid = CFS_FOREVER, .entry_valid_nsec = CFS_FOREVER_NSEC,
	.attr_valid = ENTRY_DEFAULT_VALID,
	.attr = { .mode = S_IFREG, .nlink = 1, .blksize = BLOCK_SIZE },
};

static void answer_lookup(struct cfs_thread *thread, uint32_t directory)
{
	const struct cfs_table *table = &thread->worker->table;
	const uint8_t *name = cfs_argument(thread);
	const uint8_t *end = memchr(name, '\0', cfs_argument_size(thread));
	struct fuse_entry_out entry;
	uint32_t ino;

	if (!end) {
		cfs_reply_error(thread, EINVAL);
		return;
	}
	if (end - name > NAME_MAX) {
		cfs_reply_error(thread, ENAMETOOLONG);
		return;
	}
	ino = cfs_table_lookup(table, directory, name, (size_t)(end - name));
	if (!ino) {
		cfs_reply(thread, &negative_entry, sizeof(negative_entry));
		return;
	}
	cfs_fill_entry(table, ino, &entry);
	cfs_reply(thread, &entry, sizeof(entry));
	if (!S_ISDIR(table->mode[ino]))
		cfs_note_look(thread, directory);
}

static void answer_forget(struct cfs_thread *thread, uint32_t ino)
{
	cfs_forget(thread, ino);
}

static void answer_batch_forget(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_batch_forget_in *in = CFS_ARGUMENT(thread, struct fuse_batch_forget_in);
	const struct fuse_forget_one *one = (const void *)(in + 1);
	size_t nr = (cfs_argument_size(thread) - sizeof(*in)) / sizeof(*one);

	(void)ino;
	if (nr > in->count)
		nr = in->count;
	for (; nr; nr--, one++)
		if (one->nodeid >= CFS_ROOT && one->nodeid < thread->worker->table.nr_inodes)
			cfs_forget(thread, (uint32_t)one->nodeid);
}

/* What is relayed is answered at once too: there is nothing to interrupt. */
static void ignore(struct cfs_thread *thread, uint32_t ino)
{
	(void)thread;
	(void)ino;
}

static void answer_getattr(struct cfs_thread *thread, uint32_t ino)
{
	struct fuse_attr_out out = { .attr_valid = CFS_FOREVER,
				     .attr_valid_nsec = CFS_FOREVER_NSEC };

	fill_attr(&thread->worker->table, ino, &out.attr);
	cfs_reply(thread, &out, sizeof(out));
}

static void answer_readlink(struct cfs_thread *thread, uint32_t ino)
{
	const struct cfs_table *table = &thread->worker->table;

	if (S_ISLNK(table->mode[ino]))
		cfs_reply(thread, cfs_table_bytes(table, table->inline_off[ino]),
			  table->inline_size[ino]);
	else
		cfs_reply_error(thread, EINVAL);
}

/* The rest is default_permissions' work. */
static void answer_access(struct cfs_thread *thread, uint32_t ino)
{
	(void)ino;
	cfs_reply_error(thread,
			CFS_ARGUMENT(thread, struct fuse_access_in)->mask & W_OK ? EACCES : 0);
}

/* Whether an inode has no contents by its kind: 0 or an errno. */
static int why_no_file(const struct cfs_table *table, uint32_t ino)
{
	if (S_ISDIR(table->mode[ino]))
		return EISDIR;
	return S_ISREG(table->mode[ino]) ? 0 : EINVAL;
}

/*
 * Contents that overlayfs reads itself; whoever asks here would miss the check of their digest.
 * OPEN is not refused: overlayfs opens a file here to ask for its flags when it copies it up.
 */
static bool is_withheld(const struct cfs_worker *worker, uint32_t ino)
{
	const struct cfs_table *table = &worker->table;
	uint32_t object = table->object[ino];

	return worker->config.is_metadata_only && table->inline_size[ino] != table->size[ino] &&
	       object != CFS_NO_OBJECT && table->object_path_size[object];
}

static void answer_open(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_open_in *in = CFS_ARGUMENT(thread, struct fuse_open_in);
	const struct cfs_open_out withheld = { .fh = ino };
	int error = why_no_file(&thread->worker->table, ino);

	if (!error && in->flags & (O_ACCMODE | O_TRUNC))
		error = EROFS;
	if (!error && __atomic_load_n(&thread->worker->no_open, __ATOMIC_RELAXED))
		error = ENOSYS; /* the kernel will never ask again */
	if (error)
		cfs_reply_error(thread, error);
	else if (is_withheld(thread->worker, ino))
		cfs_reply(thread, &withheld, sizeof(withheld));
	else
		cfs_open(thread, ino, in->flags);
}

static void answer_read(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_read_in *in = CFS_ARGUMENT(thread, struct fuse_read_in);
	uint64_t file_size = thread->worker->table.size[ino];
	uint64_t size = in->size < CFS_DATA_SIZE ? in->size : CFS_DATA_SIZE;
	int error = why_no_file(&thread->worker->table, ino);

	if (!error && is_withheld(thread->worker, ino))
		error = EACCES;
	if (error) {
		cfs_reply_error(thread, error);
		return;
	}
	if (in->offset >= file_size)
		size = 0;
	else if (size > file_size - in->offset)
		size = file_size - in->offset;
	if (size)
		cfs_read(thread, ino, in->offset, (uint32_t)size);
	else
		cfs_reply(thread, NULL, 0);
}

static void answer_release(struct cfs_thread *thread, uint32_t ino)
{
	if (S_ISREG(thread->worker->table.mode[ino]) &&
	    !__atomic_load_n(&thread->worker->no_open, __ATOMIC_RELAXED))
		cfs_release(thread, ino, CFS_ARGUMENT(thread, struct fuse_release_in)->fh);
	else
		cfs_reply(thread, NULL, 0);
}

static void answer_opendir(struct cfs_thread *thread, uint32_t ino)
{
	const struct cfs_open_out out = { .fh = ino,
					  .open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR };

	if (!S_ISDIR(thread->worker->table.mode[ino]))
		cfs_reply_error(thread, ENOTDIR);
	else if (__atomic_load_n(&thread->worker->no_opendir, __ATOMIC_RELAXED))
		cfs_reply_error(thread, ENOSYS); /* the kernel will never ask again */
	else
		cfs_reply(thread, &out, sizeof(out));
}

static void answer_releasedir(struct cfs_thread *thread, uint32_t ino)
{
	(void)ino;
	cfs_reply(thread, NULL, 0);
}

/*
 * FLUSH has nothing to write, and STATX would tell of a time of birth: the kernel asks once.  It
 * asks for IOCTL again and again, and Python at each open (isatty); that becomes ENOTTY.
 */
static void answer_no_support(struct cfs_thread *thread, uint32_t ino)
{
	(void)ino;
	cfs_reply_error(thread, ENOSYS);
}

/* With bfree 0 as well, df would call every mount 100 % full; so it prints "-". */
static void answer_statfs(struct cfs_thread *thread, uint32_t ino)
{
	uint64_t nr_blocks = thread->worker->table.nr_blocks;
	const struct fuse_statfs_out out = { .st = {
		.blocks = nr_blocks, .bfree = nr_blocks, .bsize = BLOCK_SIZE,
		.frsize = BLOCK_SIZE, .namelen = NAME_MAX } };

	(void)ino;
	cfs_reply(thread, &out, sizeof(out));
}

/* What is not here is relayed. */
static const struct operation {
	void (*answer)(struct cfs_thread *thread, uint32_t ino);
	uint16_t argument_size; /* at least */
	bool needs_node;
	bool is_silent; /* no reply, not even with an error */
} operations[CFS_NR_OPCODES] = {
	[FUSE_LOOKUP] = { answer_lookup, 1, true, false },
	[FUSE_FORGET] = { answer_forget, 0, true, true },
	[FUSE_GETATTR] = { answer_getattr, 0, true, false },
	[FUSE_READLINK] = { answer_readlink, 0, true, false },
	[FUSE_OPEN] = { answer_open, sizeof(struct fuse_open_in), true, false },
	[FUSE_READ] = { answer_read, sizeof(struct fuse_read_in), true, false },
	[FUSE_STATFS] = { answer_statfs, 0, false, false },
	[FUSE_RELEASE] = { answer_release, sizeof(struct fuse_release_in), true, false },
	[FUSE_GETXATTR] = { cfs_answer_getxattr, sizeof(struct fuse_getxattr_in), true, false },
	[FUSE_LISTXATTR] = { cfs_answer_listxattr, sizeof(struct fuse_getxattr_in), true, false },
	[FUSE_FLUSH] = { answer_no_support, 0, true, false },
	[FUSE_INIT] = { cfs_answer_init, 16, false, false },
	[FUSE_OPENDIR] = { answer_opendir, 0, true, false },
	[FUSE_READDIR] = { cfs_answer_readdir, sizeof(struct fuse_read_in), true, false },
	[FUSE_RELEASEDIR] = { answer_releasedir, 0, true, false },
	[FUSE_ACCESS] = { answer_access, sizeof(struct fuse_access_in), true, false },
	[FUSE_INTERRUPT] = { ignore, 0, false, true },
	[FUSE_IOCTL] = { answer_no_support, 0, true, false },
	[FUSE_BATCH_FORGET] = { answer_batch_forget, sizeof(struct fuse_batch_forget_in), false,
				true },
	[FUSE_READDIRPLUS] = { cfs_answer_readdirplus, sizeof(struct fuse_read_in), true, false },
	[CFS_STATX] = { answer_no_support, 0, true, false },
};

void cfs_dispatch(struct cfs_thread *thread)
{
	const struct fuse_in_header *header = cfs_header(thread);
	uint32_t opcode = header->opcode < CFS_NR_OPCODES ? header->opcode : 0;
	const struct operation *operation = &operations[opcode];
	int error = 0;

	cfs_count(&cfs_counters(thread)->requests[opcode], 1);
	if (!operation->answer) {
		cfs_relay_request(thread);
		return;
	}
	if (cfs_argument_size(thread) < operation->argument_size)
		error = EINVAL;
	else if (operation->needs_node && (header->nodeid < CFS_ROOT ||
					   header->nodeid >= thread->worker->table.nr_inodes))
		error = ESTALE;
	if (!error)
		operation->answer(thread, (uint32_t)header->nodeid);
	else if (!operation->is_silent)
		cfs_reply_error(thread, error);
}
