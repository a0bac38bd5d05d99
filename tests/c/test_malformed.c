/*
 * Requests that no kernel sends: each gets exactly one reply, or none where none is due, and
 * serving goes on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "harness.h"
#include "tests.h"
#include "tree.h"

static struct device device;

static bool has_reply(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

/* INIT has a test of its own; the others, never seen, may be answered or not. */
static bool is_ordinary(uint32_t opcode)
{
	return opcode != FUSE_INIT && opcode != FUSE_DESTROY && opcode != FUSE_NOTIFY_REPLY;
}

/* Send, take the reply if one is due; its error, or 0. */
static int try(uint32_t opcode, uint64_t ino, const void *argument, size_t size)
{
	if (has_reply(opcode))
		return device_call(&device, opcode, ino, argument, size);
	device_send(&device, opcode, ino, argument, size);
	device_check_serves(&device);
	return 0;
}

static void test_bad_node_ids(const char *objects)
{
	static const uint64_t bad[] = { 0, TREE_NR_INODES, 1ull << 32, (1ull << 32) + 1,
					UINT64_MAX, 1ull << 63 };
	static const uint32_t opcodes[] = {
		FUSE_LOOKUP, FUSE_GETATTR, FUSE_READLINK, FUSE_READ, FUSE_READDIR,
		FUSE_READDIRPLUS, FUSE_GETXATTR, FUSE_LISTXATTR, FUSE_OPEN, FUSE_FORGET,
	};
	uint8_t argument[64] = { 0 };

	for (unsigned int round = 0; round < 2; round++) {
		device_init(&device, &(struct setup){ .objects = objects,
						      .masked_flags = round ? ~0ull : 0 });
		for (unsigned int index = 0; index < sizeof(opcodes) / sizeof(*opcodes); index++) {
			for (unsigned int at = 0; at < sizeof(bad) / sizeof(*bad); at++) {
				memset(argument, 'x', sizeof(argument) - 1);
				if (opcodes[index] == FUSE_READ)
					memset(argument, 0, 24);
				int error = try(opcodes[index], bad[at], argument, sizeof(argument));

				CHECK(error || !has_reply(opcodes[index]));
			}
		}
		device_check_serves(&device);
		device_close(&device);
	}
}

static void test_wrong_kinds_of_inodes(const char *objects)
{
	struct fuse_read_in wanted = { .size = 4096 };
	static const uint64_t no_directories[] = { TREE_INLINE, TREE_LINK, TREE_DEVICE,
						   TREE_OBJECT };
	static const uint64_t no_files[] = { TREE_ROOT, TREE_EMPTY, TREE_LINK, TREE_DEVICE };

	device_init(&device, &(struct setup){ .objects = objects });
	for (unsigned int index = 0; index < 4; index++) {
		uint64_t ino = no_directories[index];

		CHECK(try(FUSE_READDIR, ino, &wanted, sizeof(wanted)) != 0);
		CHECK(try(FUSE_READDIRPLUS, ino, &wanted, sizeof(wanted)) != 0);
		if (try(FUSE_LOOKUP, ino, "x", 2) == 0)
			CHECK(((struct fuse_entry_out *)(void *)device.reply)->nodeid == 0);
		CHECK(try(FUSE_READ, no_files[index], &wanted, sizeof(wanted)) != 0);
	}
	device_close(&device);
}

/* Every opcode with every short argument, of zeros and of ones. */
static void test_short_arguments(const char *objects)
{
	uint8_t argument[48];

	device_init(&device, &(struct setup){ .objects = objects });
	for (uint32_t opcode = 0; opcode < 70; opcode++) {
		if (!is_ordinary(opcode))
			continue;
		for (size_t size = 0; size <= sizeof(argument); size++) {
			for (unsigned int round = 0; round < 4; round++) {
				memset(argument, round & 1 ? 0xff : 0, sizeof(argument));
				try(opcode, round & 2 ? TREE_INLINE : TREE_ROOT, argument, size);
			}
		}
	}
	device_check_serves(&device);
	device_close(&device);
}

static void test_names_without_end(const char *objects)
{
	static char name[CFS_IN_SIZE - HEADER_SIZE];
	static const size_t sizes[] = { 1, 3, 255, 256, 257, 4096, 65536, sizeof(name) };

	(void)objects;
	memset(name, 'n', sizeof(name));
	device_init(&device, &(struct setup){ 0 });
	for (unsigned int index = 0; index < sizeof(sizes) / sizeof(*sizes); index++) {
		CHECK(try(FUSE_LOOKUP, TREE_ROOT, name, sizes[index]) != 0);
		CHECK(try(FUSE_GETXATTR, TREE_INLINE, name, sizes[index]) != 0);
	}
	CHECK(try(FUSE_LOOKUP, TREE_ROOT, "", 0) != 0);
	device_check_serves(&device);
	device_close(&device);
}

static void test_wrong_lengths(const char *objects)
{
	static uint8_t message[CFS_IN_SIZE + 1];
	struct fuse_in_header *header = (void *)message;
	static const uint32_t lengths[] = { 0, 1, 39, 40, 41, 1000, UINT32_MAX };
	static const size_t sizes[] = { 1, 4, 39, 40, 56, 4096, CFS_IN_SIZE, CFS_IN_SIZE + 1 };

	(void)objects;
	device_init(&device, &(struct setup){ 0 });
	for (unsigned int index = 0; index < sizeof(sizes) / sizeof(*sizes); index++) {
		if (sizes[index] > device.max_reply)
			continue;
		for (unsigned int at = 0; at < sizeof(lengths) / sizeof(*lengths); at++) {
			if (lengths[at] == sizes[index])
				continue;
			*header = (struct fuse_in_header){ .len = lengths[at],
							   .opcode = FUSE_GETATTR,
							   .unique = 0x7777, .nodeid = 1 };
			device_send_raw(&device, message, sizes[index]);
		}
	}
	/* Whether these are answered is not said; what follows must be. */
	device_send(&device, FUSE_GETATTR, 1, message, sizeof(struct fuse_getattr_in));
	do {
		device_receive(&device);
	} while (device.reply_unique != device.unique);
	device_check_serves(&device);
	device_close(&device);
}

static void test_forgets_of_anything(const char *objects)
{
	struct {
		struct fuse_batch_forget_in head;
		struct fuse_forget_one one[4];
	} batch = { .head = { .count = 4 } };
	static const uint32_t counts[] = { 0, 1, 4, 5, 1u << 28, UINT32_MAX };

	(void)objects;
	device_init(&device, &(struct setup){ 0 });
	for (unsigned int index = 0; index < 4; index++)
		batch.one[index].nodeid = (uint64_t[]){ 0, 1, TREE_NR_INODES, UINT64_MAX }[index];
	for (unsigned int index = 0; index < sizeof(counts) / sizeof(*counts); index++) {
		batch.head.count = counts[index];
		for (size_t size = 0; size <= sizeof(batch); size += 4)
			try(FUSE_BATCH_FORGET, 0, &batch, size);
	}
	device_close(&device);
}

static void test_init_of_other_versions_fails(const char *objects)
{
	static const uint32_t majors[] = { 0, 6, 8, UINT32_MAX };
	struct fuse_init_in init = { .minor = 45, .flags = ~0u };

	(void)objects;
	for (unsigned int index = 0; index < sizeof(majors) / sizeof(*majors); index++) {
		device_open(&device, &(struct setup){ 0 });
		init.major = majors[index];
		CHECK(device_call(&device, FUSE_INIT, 0, &init, sizeof(init)) == EPROTO);
		CHECK(wait_readable(device.event_fd, DEADLINE_MS));
		CHECK(cfs_worker_events(device.worker) == CFS_EVENT_FAILED);
		CHECK(cfs_worker_failure(device.worker)[0]);
		device_close(&device);
	}
	device_open(&device, &(struct setup){ 0 });
	for (size_t size = 0; size < 16; size++)
		CHECK(device_call(&device, FUSE_INIT, 0, &init, size) != 0);
	device_close(&device);
}

const struct test malformed_tests[] = {
	{ "bad node ids", test_bad_node_ids },
	{ "wrong kinds of inodes", test_wrong_kinds_of_inodes },
	{ "short arguments", test_short_arguments },
	{ "names without end", test_names_without_end },
	{ "wrong lengths", test_wrong_lengths },
	{ "forgets of anything", test_forgets_of_anything },
	{ "init of other versions fails", test_init_of_other_versions_fails },
	{ 0 },
};
