#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include "harness.h"
#include "tests.h"
#include "tree.h"

static struct device device;

static void begin(void)
{
	device_init(&device, &(struct setup){ 0 });
}

static void check_attr(const struct fuse_attr *attr, uint64_t ino)
{
	CHECK(attr->ino == ino);
	CHECK(attr->blksize == 4096);
	CHECK(attr->atime == attr->mtime && attr->ctime == attr->mtime);
	CHECK(attr->atimensec == attr->mtimensec && attr->ctimensec == attr->mtimensec);
	if (ino == TREE_INLINE) {
		CHECK(attr->mode == (S_IFREG | 0644) && attr->nlink == 1);
		CHECK(attr->uid == 1000 && attr->gid == 70000);
		CHECK(attr->size == strlen(tree_inline_text) && attr->blocks == 8);
		CHECK((int64_t)attr->mtime == -7 && attr->mtimensec == 999999999);
	} else if (ino == TREE_DEVICE) {
		CHECK(attr->mode == (S_IFCHR | 0640) && attr->rdev == 0x12345678);
	} else if (ino == TREE_BIG) {
		CHECK(attr->mode == (S_IFDIR | 0750) && attr->nlink == 2 && attr->blocks == 0);
	}
}

static void test_init_takes_what_is_offered_only(const char *objects)
{
	const struct cfs_init_out *out = (const void *)device.reply;
	uint64_t offered = FUSE_ASYNC_READ | FUSE_MAX_PAGES | FUSE_NO_OPEN_SUPPORT;

	(void)objects;
	device_open(&device, &(struct setup){ 0 });
	CHECK(device_send_init(&device, 31, offered));
	CHECK(device.reply_size == sizeof(*out));
	CHECK(out->major == 7 && out->minor == 31);
	CHECK((out->flags & ~offered) == 0);
	CHECK(out->flags2 == 0 || out->flags & FUSE_INIT_EXT);
	CHECK(out->max_write >= 4096);
	device_check_serves(&device);
	device_close(&device);
	device_open(&device, &(struct setup){ .masked_flags = ~0ull });
	CHECK(device_send_init(&device, 100, ALL_FLAGS));
	CHECK(out->minor == CFS_FUSE_MINOR);
	CHECK(out->flags == 0 && out->flags2 == 0);
	device_check_serves(&device);
	device_close(&device);
}

static void test_lookup(const char *objects)
{
	const struct fuse_entry_out *out = (const void *)device.reply;
	char name[300];

	(void)objects;
	begin();
	CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_ROOT, "inline") == 0);
	CHECK(device.reply_size == sizeof(*out));
	CHECK(out->nodeid == TREE_INLINE);
	CHECK(out->entry_valid > UINT32_MAX && out->attr_valid > UINT32_MAX);
	check_attr(&out->attr, TREE_INLINE);
	for (unsigned int number = 0; number < TREE_NR_FILES; number += 37) {
		snprintf(name, sizeof(name), "%04u", number);
		CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_BIG, name) == 0);
		CHECK(out->nodeid == TREE_FIRST_FILE + number);
	}
	CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_ROOT, "inlin") == 0);
	CHECK(out->nodeid == 0 && out->entry_valid > UINT32_MAX);
	CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_EMPTY, "x") == 0);
	CHECK(out->nodeid == 0);
	memset(name, 'n', sizeof(name));
	name[255] = 0;
	CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_ROOT, name) == 0);
	CHECK(out->nodeid == 0);
	name[255] = 'n';
	name[256] = 0;
	CHECK(device_call_name(&device, FUSE_LOOKUP, TREE_ROOT, name) == ENAMETOOLONG);
	device_close(&device);
}

static void test_getattr(const char *objects)
{
	const struct fuse_attr_out *out = (const void *)device.reply;
	struct fuse_getattr_in wanted = { 0 };

	(void)objects;
	begin();
	for (uint64_t ino = 1; ino < TREE_NR_INODES; ino++) {
		CHECK(device_call(&device, FUSE_GETATTR, ino, &wanted, sizeof(wanted)) == 0);
		CHECK(device.reply_size == sizeof(*out));
		CHECK(out->attr_valid > UINT32_MAX);
		check_attr(&out->attr, ino);
	}
	device_close(&device);
}

static void test_readlink(const char *objects)
{
	(void)objects;
	begin();
	CHECK(device_call(&device, FUSE_READLINK, TREE_LINK, NULL, 0) == 0);
	CHECK(device.reply_size == strlen(tree_link_target));
	CHECK(memcmp(device.reply, tree_link_target, device.reply_size) == 0);
	CHECK(device_call(&device, FUSE_READLINK, TREE_INLINE, NULL, 0) != 0);
	device_close(&device);
}

/* Check the entries of a reply; the offset where the next one begins. */
static uint64_t check_listing(uint64_t ino, uint64_t off, bool is_plus)
{
	size_t at = 0;

	while (at < device.reply_size) {
		const struct fuse_entry_out *entry = (const void *)(device.reply + at);
		const struct fuse_dirent *dirent = (const void *)(entry + (is_plus ? 1 : 0));
		char name[8];

		at = (size_t)((const uint8_t *)dirent - device.reply);
		CHECK(at + FUSE_NAME_OFFSET + dirent->namelen <= device.reply_size);
		at += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + dirent->namelen);
		CHECK(dirent->off == ++off);
		if (is_plus && entry->nodeid)
			check_attr(&entry->attr, dirent->ino);
		if (off <= 2) {
			CHECK(dirent->namelen == off && memcmp(dirent->name, "..", off) == 0);
			CHECK(dirent->ino == (off == 1 ? ino : TREE_ROOT));
			CHECK(!is_plus || entry->nodeid == 0);
			CHECK(dirent->type == S_IFDIR >> 12);
		} else if (ino == TREE_BIG) {
			snprintf(name, sizeof(name), "%04u", (unsigned int)(off - 3));
			CHECK(dirent->namelen == 4 && memcmp(dirent->name, name, 4) == 0);
			CHECK(dirent->ino == TREE_FIRST_FILE + off - 3);
			CHECK(dirent->type == S_IFREG >> 12);
			CHECK(!is_plus || !entry->nodeid || entry->nodeid == dirent->ino);
		}
	}
	CHECK(at == device.reply_size);
	return off;
}

static void list(uint64_t ino, uint32_t opcode, uint32_t size, uint64_t expected)
{
	struct fuse_read_in wanted = { .size = size };
	uint64_t off;

	do {
		CHECK(device_call(&device, opcode, ino, &wanted, sizeof(wanted)) == 0);
		CHECK(device.reply_size <= size);
		off = wanted.offset;
		wanted.offset = check_listing(ino, off, opcode == FUSE_READDIRPLUS);
	} while (wanted.offset > off);
	CHECK(off == expected);
}

static void test_listings(const char *objects)
{
	static const uint32_t sizes[] = { 176, 177, 4096, 5000, 32768, 100000, 1 << 20 };

	(void)objects;
	begin();
	for (unsigned int index = 0; index < sizeof(sizes) / sizeof(*sizes); index++) {
		if (sizes[index] > device.max_reply)
			continue;
		for (unsigned int round = 0; round < 2; round++) {
			uint32_t opcode = round ? FUSE_READDIRPLUS : FUSE_READDIR;

			list(TREE_BIG, opcode, sizes[index], TREE_NR_FILES + 2);
			list(TREE_EMPTY, opcode, sizes[index], 2);
			list(TREE_ROOT, opcode, sizes[index], 2 + TREE_SPARSE - TREE_ROOT);
		}
	}
	device_close(&device);
}

static void test_listing_from_anywhere(const char *objects)
{
	struct fuse_read_in wanted = { .size = 4096 };
	static const uint64_t ends[] = { TREE_NR_FILES + 2, TREE_NR_FILES + 3, 1ull << 32,
					 1ull << 63, UINT64_MAX };

	(void)objects;
	begin();
	for (unsigned int round = 0; round < 2; round++) {
		uint32_t opcode = round ? FUSE_READDIRPLUS : FUSE_READDIR;

		for (wanted.offset = 0; wanted.offset < TREE_NR_FILES + 2; wanted.offset += 41) {
			CHECK(device_call(&device, opcode, TREE_BIG, &wanted, sizeof(wanted)) == 0);
			CHECK(check_listing(TREE_BIG, wanted.offset, round) > wanted.offset);
		}
		for (unsigned int index = 0; index < sizeof(ends) / sizeof(*ends); index++) {
			wanted.offset = ends[index];
			if (device_call(&device, opcode, TREE_BIG, &wanted, sizeof(wanted)) == 0)
				CHECK(device.reply_size == 0);
		}
	}
	device_close(&device);
}

static int get_xattr(uint64_t ino, const char *name, uint32_t size)
{
	struct fuse_getxattr_in wanted = { .size = size };
	uint8_t argument[512];

	memcpy(argument, &wanted, sizeof(wanted));
	strcpy((char *)argument + sizeof(wanted), name);
	return device_call(&device, FUSE_GETXATTR, ino, argument,
			   sizeof(wanted) + strlen(name) + 1);
}

static void test_xattrs(const char *objects)
{
	const struct fuse_getxattr_out *out = (const void *)device.reply;
	struct fuse_getxattr_in wanted = { 0 };
	static const char names[] = "user.one\0trusted.two\0user.big";

	(void)objects;
	begin();
	CHECK(get_xattr(TREE_INLINE, "user.one", 0) == 0);
	CHECK(device.reply_size == sizeof(*out) && out->size == 5);
	CHECK(get_xattr(TREE_INLINE, "user.one", 4) == ERANGE);
	CHECK(get_xattr(TREE_INLINE, "user.one", 5) == 0);
	CHECK(device.reply_size == 5 && memcmp(device.reply, "value", 5) == 0);
	CHECK(get_xattr(TREE_INLINE, "user.one", UINT32_MAX) == 0);
	CHECK(device.reply_size == 5);
	CHECK(get_xattr(TREE_INLINE, "user.big", 65536) == 0);
	CHECK(device.reply_size == TREE_BIG_VALUE && device.reply[TREE_BIG_VALUE - 1] == 'b');
	CHECK(get_xattr(TREE_INLINE, "trusted.two", 10) == 0);
	CHECK(device.reply_size == 0);
	CHECK(get_xattr(TREE_INLINE, "user.on", 10) == ENODATA);
	CHECK(get_xattr(TREE_ROOT, "user.one", 10) == ENODATA);
	CHECK(get_xattr(TREE_ROOT, "security.selinux", 10) == EOPNOTSUPP);
	CHECK(get_xattr(TREE_ROOT, "system.posix_acl_access", 0) == EOPNOTSUPP);
	CHECK(device_call(&device, FUSE_LISTXATTR, TREE_INLINE, &wanted, sizeof(wanted)) == 0);
	CHECK(device.reply_size == sizeof(*out) && out->size == sizeof(names));
	wanted.size = sizeof(names) - 1;
	CHECK(device_call(&device, FUSE_LISTXATTR, TREE_INLINE, &wanted, sizeof(wanted)) == ERANGE);
	wanted.size = sizeof(names);
	CHECK(device_call(&device, FUSE_LISTXATTR, TREE_INLINE, &wanted, sizeof(wanted)) == 0);
	CHECK(device.reply_size == sizeof(names));
	CHECK(memcmp(device.reply, names, sizeof(names)) == 0);
	CHECK(device_call(&device, FUSE_LISTXATTR, TREE_ROOT, &wanted, sizeof(wanted)) == 0);
	CHECK(device.reply_size == 0);
	device_close(&device);
	device_init(&device, &(struct setup){ .without_xattrs = true });
	CHECK(get_xattr(TREE_INLINE, "user.one", 10) == ENOSYS);
	CHECK(device_call(&device, FUSE_LISTXATTR, TREE_INLINE, &wanted, sizeof(wanted)) == ENOSYS);
	device_close(&device);
}

static void test_statfs(const char *objects)
{
	const struct fuse_statfs_out *out = (const void *)device.reply;

	(void)objects;
	begin();
	CHECK(device_call(&device, FUSE_STATFS, TREE_ROOT, NULL, 0) == 0);
	CHECK(device.reply_size == sizeof(*out));
	CHECK(out->st.blocks == 100 && out->st.bfree == 100 && out->st.bavail == 0);
	CHECK(out->st.bsize == 4096 && out->st.frsize == 4096 && out->st.namelen == 255);
	device_close(&device);
}

const struct test metadata_tests[] = {
	{ "init takes what is offered only", test_init_takes_what_is_offered_only },
	{ "lookup", test_lookup },
	{ "getattr", test_getattr },
	{ "readlink", test_readlink },
	{ "listings", test_listings },
	{ "listing from anywhere", test_listing_from_anywhere },
	{ "xattrs", test_xattrs },
	{ "statfs", test_statfs },
	{ 0 },
};
