/*
 * Attach to a published inode vector and check everything in it, once: after that no offset, size
 * or row number in it can lead astray (cfs/inodes.py says what the columns mean).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "table.h"

#define MAGIC "cfsinode"
#define ALIGNMENT 64u
#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
#define SELINUX_NAME "security.selinux"

/* What the number of elements of a column must be. */
enum rows { INODES, INODES_AND_END, DIRENTS, XATTRS, OBJECTS, DIGESTS, BYTES };

static const struct {
	uint8_t width;
	uint8_t rows;
	uint16_t field; /* offset of the pointer in struct cfs_table */
} columns[CFS_NR_COLUMNS] = {
#define COLUMN(number, name, rows) \
	[number] = { sizeof(*((struct cfs_table *)0)->name), rows, offsetof(struct cfs_table, name) }
	COLUMN(CFS_MODE, mode, INODES),
	COLUMN(CFS_NLINK, nlink, INODES),
	COLUMN(CFS_UID, uid, INODES),
	COLUMN(CFS_GID, gid, INODES),
	COLUMN(CFS_RDEV, rdev, INODES),
	COLUMN(CFS_SIZE, size, INODES),
	COLUMN(CFS_MTIME_SEC, mtime_sec, INODES),
	COLUMN(CFS_MTIME_NSEC, mtime_nsec, INODES),
	COLUMN(CFS_NID, nid, INODES),
	COLUMN(CFS_PARENT, parent, INODES),
	COLUMN(CFS_DIRENT_START, dirent_start, INODES_AND_END),
	COLUMN(CFS_DIRENT_NAME_OFF, dirent_name_off, DIRENTS),
	COLUMN(CFS_DIRENT_NAME_SIZE, dirent_name_size, DIRENTS),
	COLUMN(CFS_DIRENT_INO, dirent_ino, DIRENTS),
	COLUMN(CFS_XATTR_START, xattr_start, INODES_AND_END),
	COLUMN(CFS_XATTR_NAME_OFF, xattr_name_off, XATTRS),
	COLUMN(CFS_XATTR_NAME_SIZE, xattr_name_size, XATTRS),
	COLUMN(CFS_XATTR_VALUE_OFF, xattr_value_off, XATTRS),
	COLUMN(CFS_XATTR_VALUE_SIZE, xattr_value_size, XATTRS),
	COLUMN(CFS_INLINE_OFF, inline_off, INODES),
	COLUMN(CFS_INLINE_SIZE, inline_size, INODES),
	COLUMN(CFS_OBJECT, object, INODES),
	COLUMN(CFS_OBJECT_PATH_OFF, object_path_off, OBJECTS),
	COLUMN(CFS_OBJECT_PATH_SIZE, object_path_size, OBJECTS),
	COLUMN(CFS_OBJECT_DIGEST, object_digest, DIGESTS),
	COLUMN(CFS_OBJECT_DIGEST_SIZE, object_digest_size, OBJECTS),
	COLUMN(CFS_POOL, pool, BYTES),
	COLUMN(CFS_EXTRA, extra, BYTES),
#undef COLUMN
};

uint32_t cfs_column_width(enum cfs_column column)
{
	return columns[column].width;
}

/* Check header and ranges, and point to the columns; nr[] gets their numbers of elements. */
static const char *find_columns(struct cfs_table *table, uint64_t nr[CFS_NR_COLUMNS])
{
	const struct cfs_table_header *header = (const void *)table->map;
	const struct cfs_column_range *ranges = (const void *)(header + 1);

	if (table->map_size < sizeof(*header) + CFS_NR_COLUMNS * sizeof(*ranges))
		return "inode vector: too small";
	if (memcmp(header->magic, MAGIC, sizeof(header->magic)) ||
	    header->nr_columns != CFS_NR_COLUMNS)
		return "inode vector: wrong magic or number of columns";
	if (header->has_acl > 1)
		return "inode vector: has_acl is neither 0 nor 1";
	for (unsigned int i = 0; i < CFS_NR_COLUMNS; i++) {
		const struct cfs_column_range *range = &ranges[i];
		const uint8_t *start;

		if (range->off % ALIGNMENT || range->off > table->map_size ||
		    range->size > table->map_size - range->off)
			return "inode vector: column outside the memfd or not aligned";
		if (range->size % columns[i].width)
			return "inode vector: column ends within an element";
		nr[i] = range->size / columns[i].width;
		start = table->map + range->off;
		memcpy((uint8_t *)table + columns[i].field, &start, sizeof(start));
	}
	table->has_acl = header->has_acl;
	table->nr_blocks = header->nr_blocks;
	return NULL;
}

/* Check that the columns of each kind of row are equally long. */
static const char *check_columns(struct cfs_table *table, const uint64_t nr[CFS_NR_COLUMNS])
{
	table->nr_inodes = nr[CFS_MODE];
	table->nr_dirents = nr[CFS_DIRENT_INO];
	table->nr_xattrs = nr[CFS_XATTR_VALUE_SIZE];
	table->nr_objects = nr[CFS_OBJECT_DIGEST_SIZE];
	table->pool_size = nr[CFS_POOL];
	table->extra_size = nr[CFS_EXTRA];
	if (table->nr_inodes <= CFS_ROOT || table->nr_inodes > UINT32_MAX)
		return "inode vector: no root, or more rows than row numbers";
	for (unsigned int i = 0; i < CFS_NR_COLUMNS; i++) {
		const uint64_t expected[] = {
			[INODES] = table->nr_inodes,
			[INODES_AND_END] = table->nr_inodes + 1,
			[DIRENTS] = table->nr_dirents,
			[XATTRS] = table->nr_xattrs,
			[OBJECTS] = table->nr_objects,
			[DIGESTS] = table->nr_objects * CFS_DIGEST_MAX,
			[BYTES] = nr[i],
		};

		if (nr[i] != expected[columns[i].rows])
			return "inode vector: columns of different length";
	}
	return NULL;
}

/* Whether slices begin at 0, never fall and end at the end of the rows they cut. */
static bool is_cut(const uint64_t *start, uint64_t nr_inodes, uint64_t nr_rows)
{
	if (start[0] != 0 || start[nr_inodes] != nr_rows)
		return false;
	for (uint64_t ino = 0; ino < nr_inodes; ino++)
		if (start[ino] > start[ino + 1])
			return false;
	return true;
}

/* Whether a range lies in pool or in extra, and does not cross the border. */
static bool is_inside(const struct cfs_table *table, uint64_t off, uint64_t size)
{
	if (off < table->pool_size)
		return size <= table->pool_size - off;
	off -= table->pool_size;
	return off <= table->extra_size && size <= table->extra_size - off;
}

/* Whether a range is inside and free of a byte. */
static bool is_without(const struct cfs_table *table, uint64_t off, uint64_t size, int byte)
{
	return is_inside(table, off, size) &&
	       (!size || !memchr(cfs_table_bytes(table, off), byte, size));
}

static const char *check_content(const struct cfs_table *table, uint64_t ino)
{
	uint64_t size = table->size[ino];
	uint32_t inline_size = table->inline_size[ino];

	if (size > INT64_MAX)
		return "inode vector: size beyond 2^63-1";
	if (!is_inside(table, table->inline_off[ino], inline_size))
		return "inode vector: content outside pool and extra";
	switch (table->mode[ino] & S_IFMT) {
	case S_IFREG:
		if (inline_size && inline_size != size)
			return "inode vector: content that is not of the file's size";
		break;
	case S_IFLNK:
		if (!size || size >= PATH_MAX || inline_size != size ||
		    !is_without(table, table->inline_off[ino], size, '\0'))
			return "inode vector: no valid link target";
		break;
	default:
		if (inline_size)
			return "inode vector: content of what has none";
	}
	return NULL;
}

static bool is_directory(const struct cfs_table *table, uint64_t ino)
{
	return S_ISDIR(table->mode[ino]);
}

static const char *check_inodes(const struct cfs_table *table)
{
	/* type nibbles of fifo, char, directory, block, regular, link, socket */
	const unsigned int types = 1u << 1 | 1u << 2 | 1u << 4 | 1u << 6 | 1u << 8 | 1u << 10 |
				   1u << 12;

	if (!is_directory(table, CFS_ROOT))
		return "inode vector: the root is no directory";
	if (table->dirent_start[CFS_ROOT] || table->xattr_start[CFS_ROOT])
		return "inode vector: row 0 is used";
	for (uint64_t ino = CFS_ROOT; ino < table->nr_inodes; ino++) {
		uint32_t mode = table->mode[ino], parent = table->parent[ino];
		uint32_t object = table->object[ino];
		const char *why = check_content(table, ino);

		if (why)
			return why;
		if (mode > 0177777 || !(types >> (mode >> 12) & 1))
			return "inode vector: no valid file type";
		if (parent < CFS_ROOT || parent >= table->nr_inodes || !is_directory(table, parent))
			return "inode vector: parent is no directory";
		if (!is_directory(table, ino) &&
		    table->dirent_start[ino] != table->dirent_start[ino + 1])
			return "inode vector: entries of what is no directory";
		if (object != CFS_NO_OBJECT && object >= table->nr_objects)
			return "inode vector: object out of range";
	}
	return NULL;
}

static int compare(const uint8_t *left, size_t left_size, const uint8_t *right, size_t right_size)
{
	size_t common = left_size < right_size ? left_size : right_size;
	int order = memcmp(left, right, common);

	return order ? order : (left_size > right_size) - (left_size < right_size);
}

/* Compare a name with that of a dirent. */
static int compare_dirent(const struct cfs_table *table, const uint8_t *name, size_t name_size,
			  uint64_t dirent)
{
	return compare(name, name_size, cfs_table_bytes(table, table->dirent_name_off[dirent]),
		       table->dirent_name_size[dirent]);
}

static const char *check_dirents(const struct cfs_table *table)
{
	uint64_t ino = 0; /* holder of the dirent */

	for (uint64_t dirent = 0; dirent < table->nr_dirents; dirent++) {
		uint64_t off = table->dirent_name_off[dirent];
		uint32_t size = table->dirent_name_size[dirent];
		const uint8_t *name;

		while (table->dirent_start[ino + 1] <= dirent)
			ino++;
		if (table->dirent_ino[dirent] < CFS_ROOT ||
		    table->dirent_ino[dirent] >= table->nr_inodes)
			return "inode vector: entry leads out of range";
		if (size < 1 || size > NAME_MAX || !is_without(table, off, size, '\0') ||
		    !is_without(table, off, size, '/'))
			return "inode vector: no valid name of an entry";
		name = cfs_table_bytes(table, off);
		if (name[0] == '.' && (size == 1 || (size == 2 && name[1] == '.')))
			return "inode vector: entry named . or ..";
		if (dirent > table->dirent_start[ino] &&
		    compare_dirent(table, name, size, dirent - 1) <= 0)
			return "inode vector: entries not sorted by name";
	}
	return NULL;
}

static const char *check_xattrs(struct cfs_table *table)
{
	uint64_t ino = 0; /* holder of the xattr */
	uint64_t list_size = 0; /* of its names so far */

	for (uint64_t xattr = 0; xattr < table->nr_xattrs; xattr++) {
		uint64_t off = table->xattr_name_off[xattr];
		uint32_t size = table->xattr_name_size[xattr];

		for (; table->xattr_start[ino + 1] <= xattr; ino++)
			list_size = 0;
		if (size < 1 || size > NAME_MAX || !is_without(table, off, size, '\0'))
			return "inode vector: no valid name of an xattr";
		list_size += size + 1;
		if (list_size > CFS_XATTR_LIST_MAX)
			return "inode vector: too many xattrs of an inode";
		if (table->xattr_value_size[xattr] > UINT16_MAX ||
		    !is_inside(table, table->xattr_value_off[xattr],
			       table->xattr_value_size[xattr]))
			return "inode vector: no valid value of an xattr";
		if (size == strlen(SELINUX_NAME) &&
		    !memcmp(cfs_table_bytes(table, off), SELINUX_NAME, size))
			table->has_selinux = true;
	}
	return NULL;
}

static const char *check_objects(const struct cfs_table *table)
{
	for (uint64_t object = 0; object < table->nr_objects; object++) {
		uint8_t digest_size = table->object_digest_size[object];

		if (table->object_path_size[object] >= PATH_MAX ||
		    !is_without(table, table->object_path_off[object],
				table->object_path_size[object], '\0'))
			return "inode vector: no valid path of an object";
		if (digest_size != 0 && digest_size != 32 && digest_size != CFS_DIGEST_MAX)
			return "inode vector: no valid size of a digest";
	}
	return NULL;
}

static const char *check_table(struct cfs_table *table)
{
	uint64_t nr[CFS_NR_COLUMNS];
	const char *why = find_columns(table, nr);

	if (!why)
		why = check_columns(table, nr);
	if (!why && (!is_cut(table->dirent_start, table->nr_inodes, table->nr_dirents) ||
		     !is_cut(table->xattr_start, table->nr_inodes, table->nr_xattrs)))
		why = "inode vector: slices that are not ascending";
	if (!why)
		why = check_inodes(table);
	if (!why)
		why = check_dirents(table);
	if (!why)
		why = check_xattrs(table);
	if (!why)
		why = check_objects(table);
	return why;
}

int cfs_table_check(const uint8_t *map, size_t size, struct cfs_table *table, const char **why)
{
	*table = (struct cfs_table){ .map = map, .map_size = size };
	*why = check_table(table);
	return *why ? -EINVAL : 0;
}

int cfs_table_attach(int fd, struct cfs_table *table, const char **why)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat status;
	uint8_t *map;
	int error;

	*why = "inode vector: memfd is not sealed";
	if (seals < 0 || (seals & SEALS) != SEALS)
		return -EPERM;
	*why = "inode vector: memfd cannot be mapped";
	if (fstat(fd, &status) < 0)
		return -errno;
	/* private: before Linux 6.7 a write-sealed file cannot be mapped shared, not even to read */
	map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	if (map == MAP_FAILED)
		return -errno;
	error = cfs_table_check(map, (size_t)status.st_size, table, why);
	if (error) {
		munmap(map, (size_t)status.st_size);
		*table = (struct cfs_table){ 0 };
	} else {
		/* as far as RLIMIT_MEMLOCK allows: replies should not wait for swap */
		(void)mlock(map, (size_t)status.st_size);
	}
	return error;
}

void cfs_table_detach(struct cfs_table *table)
{
	munmap((void *)(uintptr_t)table->map, table->map_size);
	*table = (struct cfs_table){ 0 };
}

uint32_t cfs_table_lookup(const struct cfs_table *table, uint32_t directory, const uint8_t *name,
			  size_t name_size)
{
	uint64_t low = table->dirent_start[directory];
	uint64_t high = table->dirent_start[directory + 1ull];

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		int order = compare_dirent(table, name, name_size, middle);

		if (!order)
			return table->dirent_ino[middle];
		if (order < 0)
			high = middle;
		else
			low = middle + 1;
	}
	return 0;
}
