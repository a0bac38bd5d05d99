#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"
#include "tests.h"
#include "tree.h"

static struct device device;

static int read_file(uint64_t ino, uint64_t fh, uint64_t off, uint32_t size)
{
	struct fuse_read_in wanted = { .fh = fh, .offset = off, .size = size };

	return device_call(&device, FUSE_READ, ino, &wanted, sizeof(wanted));
}

static void test_open_is_answered_enosys(const char *objects)
{
	struct fuse_open_in wanted = { .flags = O_RDONLY };

	device_init(&device, &(struct setup){ .objects = objects });
	CHECK(device_call(&device, FUSE_OPEN, TREE_OBJECT, &wanted, sizeof(wanted)) == ENOSYS);
	CHECK(device_call(&device, FUSE_OPENDIR, TREE_ROOT, &wanted, sizeof(wanted)) == ENOSYS);
	device_close(&device);
}

static void check_object(uint64_t off, uint32_t size, size_t expected)
{
	CHECK(read_file(TREE_OBJECT, 0, off, size) == 0);
	CHECK(device.reply_size == expected);
	for (size_t at = 0; at < expected; at++)
		CHECK(device.reply[at] == tree_object_byte(off + at));
}

static void test_read(const char *objects)
{
	uint64_t end = TREE_OBJECT_SIZE;

	device_init(&device, &(struct setup){ .objects = objects });
	CHECK(read_file(TREE_INLINE, 0, 0, 4096) == 0);
	CHECK(device.reply_size == strlen(tree_inline_text));
	CHECK(memcmp(device.reply, tree_inline_text, device.reply_size) == 0);
	CHECK(read_file(TREE_INLINE, 0, 8, 4) == 0);
	CHECK(device.reply_size == 4 && memcmp(device.reply, "that", 4) == 0);
	check_object(0, 4096, 4096);
	check_object(1, 131072, 131072);
	check_object(12345, 99999, 99999);
	check_object(end - 5, 4096, 5);
	check_object(end, 4096, 0);
	check_object(0, 0, 0);
	check_object(UINT64_MAX, UINT32_MAX, 0);
	check_object(1ull << 63, 4096, 0);
	check_object(UINT64_MAX - 4095, 4096, 0);
	if (device.max_reply >= CFS_DATA_SIZE) {
		check_object(0, CFS_DATA_SIZE, CFS_DATA_SIZE);
		check_object(777, CFS_DATA_SIZE, CFS_DATA_SIZE);
	}
	device_close(&device);
}

static void test_bad_objects_give_errors_alone(const char *objects)
{
	static const uint64_t bad[] = { TREE_LOST, TREE_SHORT, TREE_SPARSE };
	struct cfs_log_entry entry;
	unsigned int nr_lines = 0;

	device_init(&device, &(struct setup){ .objects = objects });
	for (unsigned int round = 0; round < 3; round++)
		for (unsigned int index = 0; index < sizeof(bad) / sizeof(*bad); index++)
			CHECK(read_file(bad[index], 0, 0, 4096) != 0);
	check_object(100, 4096, 4096);
	CHECK(cfs_worker_events(device.worker) & CFS_EVENT_LOG);
	while (cfs_worker_next_log(device.worker, &entry)) {
		CHECK(entry.nid == TREE_LOST + 36 || entry.nid == TREE_SHORT + 36 ||
		      entry.nid == TREE_SPARSE + 36);
		CHECK(entry.error > 0);
		nr_lines++;
	}
	CHECK(nr_lines == 3);
	device_close(&device);
}

static void test_object_cut_while_it_is_served(const char *objects)
{
	int fd;

	device_init(&device, &(struct setup){ .objects = objects });
	check_object(0, 4096, 4096);
	fd = openat(device.objects_fd, TREE_OBJECT_NAME, O_WRONLY | O_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, 10) == 0);
	CHECK(read_file(TREE_OBJECT, 0, 0, 4096) == EIO);
	CHECK(read_file(TREE_OBJECT, 0, 8192, 131072) == EIO);
	CHECK(read_file(TREE_INLINE, 0, 0, 4096) == 0);
	close(fd);
	device_close(&device);
}

static void test_open_with_handles(const char *objects)
{
	struct fuse_open_in wanted = { .flags = O_RDONLY };
	struct fuse_release_in release = { 0 };
	const struct cfs_open_out *out = (const void *)device.reply;

	device_init(&device, &(struct setup){ .objects = objects, .masked_flags = ~0ull });
	for (unsigned int round = 0; round < 3; round++) {
		CHECK(device_call(&device, FUSE_OPEN, TREE_OBJECT, &wanted, sizeof(wanted)) == 0);
		CHECK(device.reply_size == sizeof(*out));
		CHECK(out->open_flags & FOPEN_KEEP_CACHE);
		release.fh = out->fh;
		CHECK(read_file(TREE_OBJECT, out->fh, 4096, 4096) == 0);
		CHECK(device.reply_size == 4096 && device.reply[1] == tree_object_byte(4097));
		CHECK(device_call(&device, FUSE_RELEASE, TREE_OBJECT, &release, sizeof(release)) ==
		      0);
	}
	CHECK(device_call(&device, FUSE_OPEN, TREE_LOST, &wanted, sizeof(wanted)) == ENOENT);
	CHECK(device_call(&device, FUSE_OPEN, TREE_SHORT, &wanted, sizeof(wanted)) == EIO);
	CHECK(device_call(&device, FUSE_OPEN, TREE_SPARSE, &wanted, sizeof(wanted)) == EIO);
	wanted.flags = O_RDWR;
	CHECK(device_call(&device, FUSE_OPEN, TREE_OBJECT, &wanted, sizeof(wanted)) == EROFS);
	device_close(&device);
}

const struct test data_tests[] = {
	{ "open is answered enosys", test_open_is_answered_enosys },
	{ "read", test_read },
	{ "bad objects give errors alone", test_bad_objects_give_errors_alone },
	{ "object cut while it is served", test_object_cut_while_it_is_served },
	{ "open with handles", test_open_with_handles },
	{ 0 },
};
