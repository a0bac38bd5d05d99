/*
 * Any table: what cfs_table_check() accepts can be used without harm.
 *
 * The first byte of the input says what the rest is: 0, a table as it is; else patches to a small
 * valid table: one byte for the column (from CFS_NR_COLUMNS on: header and ranges), two for the
 * offset in it, eight for the value that is written there.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "table.h"

enum { ALIGNMENT = 64, PATCH_SIZE = 11, TABLE_SIZE = 64 * ALIGNMENT };

/* What the ranges of a table point at, for the sanitizers to complain about. */
static volatile uint8_t sink;

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

/* A root with a file inside, a file outside, a link and a directory; row 0 is not used. */
static const char pool[] = "abcdtexttarget./.user.xsecurity.selinuxvalue01/23";
static const uint32_t mode[] = { 0,		 S_IFDIR | 0755, S_IFREG | 0644,
				 S_IFREG | 0644, S_IFLNK | 0777, S_IFDIR | 0700 };
static const uint32_t any[6];
static const uint64_t size_of[] = { 0, 0, 4, 99, 6, 0 };
static const uint64_t mtime[] = { 0, 1, (uint64_t)-1, INT64_MAX, 2, 3 };
static const uint64_t nid[] = { 0, 36, 37, 38, 39, 40 };
static const uint32_t parent[] = { 0, 1, 1, 1, 1, 1 };
static const uint64_t dirent_start[] = { 0, 0, 4, 4, 4, 4, 5 };
static const uint64_t dirent_name_off[] = { 0, 1, 2, 3, 0 };
static const uint32_t dirent_name_size[] = { 1, 1, 1, 1, 4 };
static const uint32_t dirent_ino[] = { 2, 3, 4, 5, 2 };
static const uint64_t xattr_start[] = { 0, 0, 0, 2, 2, 2, 2 };
static const uint64_t xattr_name_off[] = { 17, 23 };
static const uint32_t xattr_name_size[] = { 6, 16 };
static const uint64_t xattr_value_off[] = { 39, 40 };
static const uint32_t xattr_value_size[] = { 5, 0 };
static const uint64_t inline_off[] = { 0, 0, 4, 0, 8, 0 };
static const uint32_t inline_size[] = { 0, 0, 4, 0, 6, 0 };
static const uint32_t object[] = { CFS_NO_OBJECT, CFS_NO_OBJECT, CFS_NO_OBJECT,
				   0,		  CFS_NO_OBJECT, CFS_NO_OBJECT };
static const uint64_t object_path_off[] = { 44 };
static const uint32_t object_path_size[] = { 5 };
static const uint8_t object_digest[CFS_DIGEST_MAX];
static const uint8_t object_digest_size[] = { 32 };
static const uint8_t extra[] = { 'e' };

static const struct {
	const void *bytes;
	size_t size;
} columns[CFS_NR_COLUMNS] = {
#define COLUMN(number, array) [number] = { array, sizeof(array) }
	COLUMN(CFS_MODE, mode),
	COLUMN(CFS_NLINK, any),
	COLUMN(CFS_UID, any),
	COLUMN(CFS_GID, any),
	COLUMN(CFS_RDEV, any),
	COLUMN(CFS_SIZE, size_of),
	COLUMN(CFS_MTIME_SEC, mtime),
	COLUMN(CFS_MTIME_NSEC, any),
	COLUMN(CFS_NID, nid),
	COLUMN(CFS_PARENT, parent),
	COLUMN(CFS_DIRENT_START, dirent_start),
	COLUMN(CFS_DIRENT_NAME_OFF, dirent_name_off),
	COLUMN(CFS_DIRENT_NAME_SIZE, dirent_name_size),
	COLUMN(CFS_DIRENT_INO, dirent_ino),
	COLUMN(CFS_XATTR_START, xattr_start),
	COLUMN(CFS_XATTR_NAME_OFF, xattr_name_off),
	COLUMN(CFS_XATTR_NAME_SIZE, xattr_name_size),
	COLUMN(CFS_XATTR_VALUE_OFF, xattr_value_off),
	COLUMN(CFS_XATTR_VALUE_SIZE, xattr_value_size),
	COLUMN(CFS_INLINE_OFF, inline_off),
	COLUMN(CFS_INLINE_SIZE, inline_size),
	COLUMN(CFS_OBJECT, object),
	COLUMN(CFS_OBJECT_PATH_OFF, object_path_off),
	COLUMN(CFS_OBJECT_PATH_SIZE, object_path_size),
	COLUMN(CFS_OBJECT_DIGEST, object_digest),
	COLUMN(CFS_OBJECT_DIGEST_SIZE, object_digest_size),
	COLUMN(CFS_POOL, pool),
	COLUMN(CFS_EXTRA, extra),
#undef COLUMN
};

/* Write the valid table; head_size gets the size of header and ranges. */
static size_t write_table(uint8_t *table, size_t *head_size)
{
	struct cfs_table_header *header = (void *)table;
	struct cfs_column_range *ranges = (void *)(header + 1);
	size_t off = sizeof(*header) + CFS_NR_COLUMNS * sizeof(*ranges);

	*head_size = off;
	memset(table, 0, TABLE_SIZE);
	memcpy(header->magic, "cfsinode", sizeof(header->magic));
	header->version = 1;
	header->nr_columns = CFS_NR_COLUMNS;
	for (unsigned int column = 0; column < CFS_NR_COLUMNS; column++) {
		off = (off + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
		ranges[column] = (struct cfs_column_range){ off, columns[column].size };
		memcpy(table + off, columns[column].bytes, columns[column].size);
		off += columns[column].size;
	}
	return off;
}

static size_t write_patched_table(uint8_t *table, const uint8_t *patches, size_t size)
{
	size_t head_size, table_size = write_table(table, &head_size);
	struct cfs_column_range ranges[CFS_NR_COLUMNS + 1];

	memcpy(ranges, table + sizeof(struct cfs_table_header), sizeof(ranges) - sizeof(*ranges));
	ranges[CFS_NR_COLUMNS] = (struct cfs_column_range){ 0, head_size };
	for (; size >= PATCH_SIZE; patches += PATCH_SIZE, size -= PATCH_SIZE) {
		const struct cfs_column_range *range = &ranges[patches[0] % (CFS_NR_COLUMNS + 1)];
		uint64_t off = (patches[1] + 256u * patches[2]) % range->size;
		uint64_t left = range->size - off;

		memcpy(table + range->off + off, patches + 3, left < 8 ? left : 8);
	}
	return table_size;
}

static void read_all(const struct cfs_table *table, uint64_t off, uint64_t size)
{
	for (; size; size--, off++)
		sink ^= *cfs_table_bytes(table, off);
}

static void use_directory(const struct cfs_table *table, uint32_t ino)
{
	for (uint64_t i = table->dirent_start[ino]; i < table->dirent_start[ino + 1ull]; i++) {
		const uint8_t *name = cfs_table_bytes(table, table->dirent_name_off[i]);
		uint32_t size = table->dirent_name_size[i];

		if (cfs_table_lookup(table, ino, name, size) != table->dirent_ino[i])
			abort();
		/* whether there is such a name is all the same */
		cfs_table_lookup(table, ino, name, size - 1);
		sink ^= (uint8_t)table->mode[table->dirent_ino[i]];
	}
	sink ^= (uint8_t)table->mode[table->parent[ino]];
}

static void use_xattrs(const struct cfs_table *table, uint32_t ino)
{
	for (uint64_t i = table->xattr_start[ino]; i < table->xattr_start[ino + 1ull]; i++) {
		read_all(table, table->xattr_name_off[i], table->xattr_name_size[i]);
		read_all(table, table->xattr_value_off[i], table->xattr_value_size[i]);
	}
}

static void use_object(const struct cfs_table *table, uint32_t row)
{
	const uint8_t *digest = table->object_digest + (size_t)row * CFS_DIGEST_MAX;

	read_all(table, table->object_path_off[row], table->object_path_size[row]);
	for (unsigned int i = 0; i < table->object_digest_size[row]; i++)
		sink ^= digest[i];
}

static void use_table(const struct cfs_table *table)
{
	if (!S_ISDIR(table->mode[CFS_ROOT]))
		abort();
	for (uint32_t ino = CFS_ROOT; ino < table->nr_inodes; ino++) {
		use_directory(table, ino);
		use_xattrs(table, ino);
		read_all(table, table->inline_off[ino], table->inline_size[ino]);
		if (table->object[ino] != CFS_NO_OBJECT)
			use_object(table, table->object[ino]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
	uint8_t scratch[TABLE_SIZE];
	const uint8_t *source = input + 1;
	struct cfs_table table;
	bool is_valid;
	const char *why;
	void *map;

	if (!size)
		return 0;
	size--;
	is_valid = input[0] && size < PATCH_SIZE;
	if (input[0]) {
		size = write_patched_table(scratch, source, size);
		source = scratch;
	}
	/* of just this size, so that the sanitizers see what lies behind */
	if (posix_memalign(&map, ALIGNMENT, size ? size : 1))
		errx(2, "out of memory");
	memcpy(map, source, size);
	if (!cfs_table_check(map, size, &table, &why))
		use_table(&table);
	else if (is_valid)
		errx(2, "the table without patches is refused: %s", why);
	free(map);
	return 0;
}
