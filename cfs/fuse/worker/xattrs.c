/*
 * Extended attributes: GETXATTR and LISTXATTR (spec fuse-data-plane 7).  The kernel caches none of
 * this, so an image without any is served as a file system that knows none: it asks but once.
 */
#include "ops.h"

#include <errno.h>
#include <string.h>

#define SELINUX "security.selinux"
#define ACL_ACCESS "system.posix_acl_access"
#define ACL_DEFAULT "system.posix_acl_default"
#define TRUSTED "trusted."

static bool is_name(const uint8_t *name, size_t size, const char *expected)
{
	return size == strlen(expected) && !memcmp(name, expected, size);
}

/*
 * Names that no inode has and that callers ask for on every file: after one EOPNOTSUPP they stop
 * asking.  With ACLs in the image, this answer would leak into permission checks.
 */
static bool is_unsupported(const struct cfs_table *table, const uint8_t *name, size_t size)
{
	return (!table->has_selinux && is_name(name, size, SELINUX)) ||
	       (!table->has_acl &&
		(is_name(name, size, ACL_ACCESS) || is_name(name, size, ACL_DEFAULT)));
}

static const uint8_t *name_of(const struct cfs_table *table, uint64_t xattr)
{
	return cfs_table_bytes(table, table->xattr_name_off[xattr]);
}

static int find(const struct cfs_table *table, uint32_t ino, const uint8_t *name, size_t size,
		uint64_t *xattr)
{
	for (uint64_t i = table->xattr_start[ino]; i < table->xattr_start[ino + 1ull]; i++)
		if (size == table->xattr_name_size[i] && !memcmp(name, name_of(table, i), size)) {
			*xattr = i;
			return 0;
		}
	return ENODATA;
}

/* Reply as the caller's buffer demands: without one, only the size. */
static void reply_sized(struct cfs_thread *thread, const void *data, uint32_t size)
{
	uint32_t room = CFS_ARGUMENT(thread, struct fuse_getxattr_in)->size;
	const struct fuse_getxattr_out out = { .size = size };

	if (!room)
		cfs_reply(thread, &out, sizeof(out));
	else if (size <= room)
		cfs_reply(thread, data, size);
	else
		cfs_reply_error(thread, ERANGE);
}

void cfs_answer_getxattr(struct cfs_thread *thread, uint32_t ino)
{
	const struct cfs_table *table = &thread->worker->table;
	const uint8_t *name = cfs_argument(thread) + sizeof(struct fuse_getxattr_in);
	const uint8_t *end = memchr(name, '\0',
				    cfs_argument_size(thread) - sizeof(struct fuse_getxattr_in));
	uint64_t xattr;
	int error;

	if (!end)
		error = EINVAL;
	else if (!table->nr_xattrs)
		error = ENOSYS;
	else if (is_unsupported(table, name, (size_t)(end - name)))
		error = EOPNOTSUPP;
	else
		error = find(table, ino, name, (size_t)(end - name), &xattr);
	if (error)
		cfs_reply_error(thread, error);
	else
		reply_sized(thread, cfs_table_bytes(table, table->xattr_value_off[xattr]),
			    table->xattr_value_size[xattr]);
}

/* The kernel filters trusted.* in getxattr only. */
static bool is_hidden(const uint8_t *name, size_t size)
{
	return size >= strlen(TRUSTED) && !memcmp(name, TRUSTED, strlen(TRUSTED));
}

void cfs_answer_listxattr(struct cfs_thread *thread, uint32_t ino)
{
	const struct cfs_table *table = &thread->worker->table;
	uint32_t total = 0; /* at most CFS_XATTR_LIST_MAX */

	if (!table->nr_xattrs) {
		cfs_reply_error(thread, ENOSYS);
		return;
	}
	for (uint64_t i = table->xattr_start[ino]; i < table->xattr_start[ino + 1ull]; i++) {
		const uint8_t *name = name_of(table, i);
		uint32_t size = table->xattr_name_size[i];

		if (cfs_header(thread)->uid && is_hidden(name, size))
			continue;
		memcpy(thread->data + total, name, size);
		thread->data[total + size] = '\0';
		total += size + 1;
	}
	reply_sized(thread, thread->data, total);
}

_Static_assert(CFS_XATTR_LIST_MAX <= CFS_DATA_SIZE, "a list of names fits");
