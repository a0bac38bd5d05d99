#define _GNU_SOURCE
#include "tree.h"

#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "table.h"

const char tree_inline_text[] = "content that lies in the image";
const char tree_link_target[] = "somewhere/else";

struct buffer {
	uint8_t *bytes;
	size_t size;
	size_t room;
};

/* One buffer for each column. */
struct builder {
	struct buffer columns[CFS_NR_COLUMNS];
};

static void append(struct buffer *buffer, const void *data, size_t size)
{
	if (!size)
		return;
	if (size > buffer->room - buffer->size) {
		buffer->room = 2 * (buffer->size + size);
		buffer->bytes = realloc(buffer->bytes, buffer->room);
	}
	if (!buffer->bytes)
		err(2, "realloc");
	memcpy(buffer->bytes + buffer->size, data, size);
	buffer->size += size;
}

static void put(struct builder *builder, enum cfs_column column, uint64_t value)
{
	append(&builder->columns[column], &value, cfs_column_width(column));
}

/* Bytes into the pool, and where they are into two columns. */
static void put_bytes(struct builder *builder, enum cfs_column off, enum cfs_column size,
		      const void *data, size_t data_size)
{
	put(builder, off, builder->columns[CFS_POOL].size);
	put(builder, size, data_size);
	append(&builder->columns[CFS_POOL], data, data_size);
}

static uint64_t nr_elements(const struct builder *builder, enum cfs_column column)
{
	return builder->columns[column].size / cfs_column_width(column);
}

static uint32_t put_object(struct builder *builder, const char *path)
{
	static const uint8_t no_digest[CFS_DIGEST_MAX];

	put_bytes(builder, CFS_OBJECT_PATH_OFF, CFS_OBJECT_PATH_SIZE, path, strlen(path));
	append(&builder->columns[CFS_OBJECT_DIGEST], no_digest, sizeof(no_digest));
	put(builder, CFS_OBJECT_DIGEST_SIZE, 0);
	return (uint32_t)nr_elements(builder, CFS_OBJECT_DIGEST_SIZE) - 1;
}

static void put_dirent(struct builder *builder, const char *name, uint32_t ino)
{
	put_bytes(builder, CFS_DIRENT_NAME_OFF, CFS_DIRENT_NAME_SIZE, name, strlen(name));
	put(builder, CFS_DIRENT_INO, ino);
}

/* What is the same for all rows, and the ends of the slices put so far. */
static void put_common(struct builder *builder, uint32_t row)
{
	put(builder, CFS_UID, row == TREE_INLINE ? 1000 : 0);
	put(builder, CFS_GID, row == TREE_INLINE ? 70000 : 0);
	put(builder, CFS_RDEV, row == TREE_DEVICE ? 0x12345678 : 0);
	put(builder, CFS_MTIME_SEC, row == TREE_INLINE ? (uint64_t)-7 : 1700000000);
	put(builder, CFS_MTIME_NSEC, row == TREE_INLINE ? 999999999 : 0);
	put(builder, CFS_NID, row + 36);
	put(builder, CFS_PARENT, row >= TREE_FIRST_FILE ? TREE_BIG : row ? TREE_ROOT : 0);
	put(builder, CFS_XATTR_START, nr_elements(builder, CFS_XATTR_NAME_OFF));
	put(builder, CFS_DIRENT_START, nr_elements(builder, CFS_DIRENT_INO));
}

static void put_row(struct builder *builder, uint32_t row, uint32_t mode, uint64_t size,
		    const char *inside, uint32_t object)
{
	put_common(builder, row);
	put(builder, CFS_MODE, mode);
	put(builder, CFS_NLINK, S_ISDIR(mode) ? 2 : 1);
	put(builder, CFS_SIZE, size);
	put_bytes(builder, CFS_INLINE_OFF, CFS_INLINE_SIZE, inside, strlen(inside));
	put(builder, CFS_OBJECT, object);
}

static void put_xattr(struct builder *builder, const char *name, const void *value, size_t size)
{
	put_bytes(builder, CFS_XATTR_NAME_OFF, CFS_XATTR_NAME_SIZE, name, strlen(name));
	put_bytes(builder, CFS_XATTR_VALUE_OFF, CFS_XATTR_VALUE_SIZE, value, size);
}

static void put_xattrs(struct builder *builder)
{
	static uint8_t big[TREE_BIG_VALUE];

	memset(big, 'b', sizeof(big));
	put_xattr(builder, "user.one", "value", 5);
	put_xattr(builder, "trusted.two", "", 0);
	put_xattr(builder, "user.big", big, sizeof(big));
}

static void put_root_entries(struct builder *builder)
{
	static const char *const names[] = {
		[TREE_BIG] = "big", [TREE_DEVICE] = "device", [TREE_EMPTY] = "empty",
		[TREE_INLINE] = "inline", [TREE_LINK] = "link", [TREE_LOST] = "lost",
		[TREE_OBJECT] = "object", [TREE_SHORT] = "short", [TREE_SPARSE] = "sparse",
	};

	for (uint32_t row = TREE_BIG; row <= TREE_SPARSE; row++)
		put_dirent(builder, names[row], row);
}

static void put_rows(struct builder *builder, bool with_xattrs)
{
	char name[8];
	uint32_t file = S_IFREG | 0644;
	size_t text_size = strlen(tree_inline_text);

	put_row(builder, 0, 0, 0, "", CFS_NO_OBJECT);
	put_row(builder, TREE_ROOT, S_IFDIR | 0755, 0, "", CFS_NO_OBJECT);
	put_root_entries(builder);
	put_row(builder, TREE_BIG, S_IFDIR | 0750, 4096, "", CFS_NO_OBJECT);
	for (uint32_t number = 0; number < TREE_NR_FILES; number++) {
		snprintf(name, sizeof(name), "%04u", number);
		put_dirent(builder, name, TREE_FIRST_FILE + number);
	}
	put_row(builder, TREE_DEVICE, S_IFCHR | 0640, 0, "", CFS_NO_OBJECT);
	put_row(builder, TREE_EMPTY, S_IFDIR | 0700, 0, "", CFS_NO_OBJECT);
	put_row(builder, TREE_INLINE, file, text_size, tree_inline_text, CFS_NO_OBJECT);
	if (with_xattrs)
		put_xattrs(builder);
	put_row(builder, TREE_LINK, S_IFLNK | 0777, strlen(tree_link_target), tree_link_target,
		CFS_NO_OBJECT);
	put_row(builder, TREE_LOST, file, TREE_LOST_SIZE, "", put_object(builder, "aa/lost"));
	put_row(builder, TREE_OBJECT, file, TREE_OBJECT_SIZE, "",
		put_object(builder, TREE_OBJECT_NAME));
	put_row(builder, TREE_SHORT, file, 100, "", put_object(builder, TREE_SHORT_NAME));
	put_row(builder, TREE_SPARSE, file, 1ull << 62, "", CFS_NO_OBJECT);
	for (uint32_t number = 0; number < TREE_NR_FILES; number++) {
		snprintf(name, sizeof(name), "%04u", number);
		put_row(builder, TREE_FIRST_FILE + number, file, 4, name, CFS_NO_OBJECT);
	}
	put(builder, CFS_XATTR_START, nr_elements(builder, CFS_XATTR_NAME_OFF));
	put(builder, CFS_DIRENT_START, nr_elements(builder, CFS_DIRENT_INO));
}

static void write_at(int fd, const void *data, size_t size, uint64_t off)
{
	if (size && pwrite(fd, data, size, (off_t)off) != (ssize_t)size)
		err(2, "pwrite");
}

/* A copy with the bytes of all columns; the builder is used up. */
static int write_table(struct builder *builder)
{
	struct cfs_table_header header = { .version = 1, .nr_blocks = 100,
					   .nr_columns = CFS_NR_COLUMNS };
	struct cfs_column_range range;
	uint64_t off = sizeof(header) + CFS_NR_COLUMNS * sizeof(range);
	int fd = memfd_create("table", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		err(2, "memfd_create");
	memcpy(header.magic, "cfsinode", sizeof(header.magic));
	write_at(fd, &header, sizeof(header), 0);
	for (unsigned int column = 0; column < CFS_NR_COLUMNS; column++) {
		struct buffer *buffer = &builder->columns[column];

		off = (off + 63) & ~63ull;
		range = (struct cfs_column_range){ .off = off, .size = buffer->size };
		write_at(fd, &range, sizeof(range), sizeof(header) + column * sizeof(range));
		write_at(fd, buffer->bytes, buffer->size, off);
		off += buffer->size;
		free(buffer->bytes);
	}
	if (ftruncate(fd, (off_t)((off + 63) & ~63ull)))
		err(2, "ftruncate");
	return fd;
}

int tree_publish(bool with_xattrs)
{
	struct builder builder = { 0 };
	int fd;

	put_rows(&builder, with_xattrs);
	fd = write_table(&builder);
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE))
		err(2, "seal");
	return fd;
}

/* Unless it is there already, whole. */
static void make_object(int directory, const char *name, uint64_t size)
{
	struct stat status;
	uint8_t *bytes;
	int fd;

	if (!fstatat(directory, name, &status, 0) && (uint64_t)status.st_size == size)
		return;
	fd = openat(directory, name, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
	bytes = malloc(size);
	if (fd < 0 || !bytes)
		err(2, "%s", name);
	for (uint64_t off = 0; off < size; off++)
		bytes[off] = tree_object_byte(off);
	write_at(fd, bytes, size, 0);
	free(bytes);
	close(fd);
}

int tree_make_objects(const char *directory)
{
	int fd = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		err(2, "%s", directory);
	mkdirat(fd, "aa", 0755);
	make_object(fd, TREE_OBJECT_NAME, TREE_OBJECT_SIZE);
	make_object(fd, TREE_SHORT_NAME, 99);
	return fd;
}
