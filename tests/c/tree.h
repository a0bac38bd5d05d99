/*
 * A small published vector for tests and fuzzers, with every kind of inode.  Row numbers are
 * fixed, so that tests name them.
 */
#ifndef CFS_TEST_TREE_H
#define CFS_TEST_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum tree_row {
	TREE_ROOT = 1,
	TREE_BIG, /* directory "big" of TREE_NR_FILES files "0000", "0001", ... */
	TREE_DEVICE, /* "device" */
	TREE_EMPTY, /* directory "empty" */
	TREE_INLINE, /* "inline", tree_inline_text */
	TREE_LINK, /* "link" to tree_link_target */
	TREE_LOST, /* "lost": its object does not exist */
	TREE_OBJECT, /* "object", the file TREE_OBJECT_NAME, see tree_object_byte() */
	TREE_SHORT, /* "short": its object is one byte too short */
	TREE_SPARSE, /* "sparse": a size but no object */
	TREE_FIRST_FILE, /* "big/0000" */
	TREE_NR_FILES = 2000,
	TREE_NR_INODES = TREE_FIRST_FILE + TREE_NR_FILES /* row 0 included */
};

enum { TREE_OBJECT_SIZE = 3 * 1024 * 1024 + 77, TREE_LOST_SIZE = 5000, TREE_BIG_VALUE = 60000 };

#define TREE_OBJECT_NAME "aa/object"
#define TREE_SHORT_NAME "aa/short"

extern const char tree_inline_text[];
extern const char tree_link_target[];

/* A sealed memfd; TREE_INLINE then has user.one = "value", trusted.two and user.big. */
int tree_publish(bool with_xattrs);

/* Put the objects below an existing directory; its descriptor (O_PATH). */
int tree_make_objects(const char *directory);

static inline uint8_t tree_object_byte(uint64_t off)
{
	return (uint8_t)(off * 7 + (off >> 11));
}

#endif
