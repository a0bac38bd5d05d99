/*
 * The published inode vector (cfs/fuse/shared.py): its layout, and access to it after it was
 * checked.  The columns mean what cfs/inodes.py says; row numbers are FUSE node ids.
 *
 * The lines above "C only" are read by cffi too (cfs/fuse/_build.py): plain declarations.
 */
#ifndef CFS_TABLE_H
#define CFS_TABLE_H

#include <stddef.h>
#include <stdint.h>

/* Little endian, at offset 0 of the memfd; a struct cfs_column_range for each column follows. */
struct cfs_table_header {
	char magic[8]; /* "cfsinode" */
	uint32_t version;
	uint32_t has_acl;
	uint64_t nr_blocks;
	uint64_t nr_columns;
};

struct cfs_column_range {
	uint64_t off; /* bytes from the start of the memfd, a multiple of 64 */
	uint64_t size; /* bytes */
};

/* In the order of COLUMNS in shared.py. */
enum cfs_column {
	CFS_MODE,
	CFS_NLINK,
	CFS_UID,
	CFS_GID,
	CFS_RDEV,
	CFS_SIZE,
	CFS_MTIME_SEC,
	CFS_MTIME_NSEC,
	CFS_NID,
	CFS_PARENT,
	CFS_DIRENT_START,
	CFS_DIRENT_NAME_OFF,
	CFS_DIRENT_NAME_SIZE,
	CFS_DIRENT_INO,
	CFS_XATTR_START,
	CFS_XATTR_NAME_OFF,
	CFS_XATTR_NAME_SIZE,
	CFS_XATTR_VALUE_OFF,
	CFS_XATTR_VALUE_SIZE,
	CFS_INLINE_OFF,
	CFS_INLINE_SIZE,
	CFS_OBJECT,
	CFS_OBJECT_PATH_OFF,
	CFS_OBJECT_PATH_SIZE,
	CFS_OBJECT_DIGEST,
	CFS_OBJECT_DIGEST_SIZE,
	CFS_POOL,
	CFS_EXTRA,
	CFS_NR_COLUMNS
};

/* Bytes of an element of a column. */
uint32_t cfs_column_width(enum cfs_column column);

/* C only */

#include <stdbool.h>

#define CFS_ROOT 1u
#define CFS_NO_OBJECT 0xffffffffu
#define CFS_DIGEST_MAX 64u
#define CFS_XATTR_LIST_MAX (1u << 20) /* bytes of all xattr names of an inode, each with its NUL */

/* A checked table: every offset, size and row number in it is good. */
struct cfs_table {
	const uint8_t *map;
	size_t map_size;
	uint64_t nr_inodes; /* row 0, never used, included */
	uint64_t nr_dirents;
	uint64_t nr_xattrs;
	uint64_t nr_objects;
	const uint32_t *mode;
	const uint32_t *nlink;
	const uint32_t *uid;
	const uint32_t *gid;
	const uint32_t *rdev;
	const uint64_t *size;
	const int64_t *mtime_sec;
	const uint32_t *mtime_nsec;
	const uint64_t *nid;
	const uint32_t *parent;
	const uint64_t *dirent_start;
	const uint64_t *dirent_name_off;
	const uint32_t *dirent_name_size;
	const uint32_t *dirent_ino;
	const uint64_t *xattr_start;
	const uint64_t *xattr_name_off;
	const uint32_t *xattr_name_size;
	const uint64_t *xattr_value_off;
	const uint32_t *xattr_value_size;
	const uint64_t *inline_off;
	const uint32_t *inline_size;
	const uint32_t *object;
	const uint64_t *object_path_off;
	const uint32_t *object_path_size;
	const uint8_t *object_digest; /* CFS_DIGEST_MAX bytes each */
	const uint8_t *object_digest_size;
	const uint8_t *pool;
	uint64_t pool_size;
	const uint8_t *extra;
	uint64_t extra_size;
	uint64_t nr_blocks;
	bool has_acl; /* some inode has a POSIX ACL */
	bool has_selinux; /* some inode has security.selinux */
};

/*
 * Map the memfd and check everything in it.  0, or -errno with a reason in *why (a static text).
 * -EPERM: not sealed; -EINVAL: the reason.  fd stays the caller's.
 */
int cfs_table_attach(int fd, struct cfs_table *table, const char **why);
void cfs_table_detach(struct cfs_table *table);

/* The same for a table that lies in memory already (fuzzers); nothing is unmapped later. */
int cfs_table_check(const uint8_t *map, size_t size, struct cfs_table *table, const char **why);

/* Bytes at an offset of the address space of pool and extra. */
static inline const uint8_t *cfs_table_bytes(const struct cfs_table *table, uint64_t off)
{
	return off < table->pool_size ? table->pool + off : table->extra + (off - table->pool_size);
}

/* Row of an entry of a directory, or 0. */
uint32_t cfs_table_lookup(const struct cfs_table *table, uint32_t directory, const uint8_t *name,
			  size_t name_size);

#endif
