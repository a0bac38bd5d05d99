/*
 * Any requests to the real loop: after each the worker still answers.
 *
 * The input is a row of messages: opcode, node id, 16 bits of size, bytes.  Opcode 255: the bytes
 * are sent as they are; node id 255: the first eight bytes are the node id.  Objects are made in
 * the working directory.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include "harness.h"
#include "tree.h"

enum { RAW = 255, MAX_MESSAGES = 32, SENTINEL = 1 };

static struct device device;
static bool is_serving;

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

/* A session ends by strange INITs; the next one has the other policy of OPEN. */
static void ensure_serving(void)
{
	static bool with_open;
	struct setup setup = { .nr_threads = 2, .objects = "objects" };

	if (is_serving)
		return;
	if (device.worker)
		device_close(&device);
	else if (mkdir(setup.objects, 0755) && errno != EEXIST)
		err(2, "%s", setup.objects);
	if (with_open)
		setup.masked_flags = ~0ull;
	with_open = !with_open;
	device_init(&device, &setup);
	is_serving = true;
}

static void see_events(void)
{
	eventfd_t ignored;

	eventfd_read(device.event_fd, &ignored);
	if (cfs_worker_events(device.worker) & (CFS_EVENT_FAILED | CFS_EVENT_ENDED))
		is_serving = false;
}

/* Ask something simple, and read until it is answered. */
static void check_answers(void)
{
	struct {
		struct fuse_in_header header;
		struct fuse_getattr_in getattr;
	} sentinel = { .header = { .len = sizeof(sentinel), .opcode = FUSE_GETATTR,
				   .unique = SENTINEL, .nodeid = TREE_ROOT } };

	device.reply_unique = 0;
	device_send_raw(&device, &sentinel, sizeof(sentinel));
	while (is_serving && device.reply_unique != SENTINEL) {
		struct pollfd wanted[2] = { { .fd = device.kernel_fd, .events = POLLIN },
					    { .fd = device.event_fd, .events = POLLIN } };

		int nr_ready = poll(wanted, 2, DEADLINE_MS);

		if (nr_ready < 0 && errno == EINTR)
			continue; /* libFuzzer's own clock */
		CHECK(nr_ready > 0);
		if (wanted[0].revents & POLLIN)
			device_receive(&device);
		if (wanted[1].revents & POLLIN)
			see_events();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
	for (unsigned int nr_sent = 0; size >= 4 && nr_sent < MAX_MESSAGES; nr_sent++) {
		uint32_t opcode = input[0];
		uint64_t ino = input[1];
		size_t part = (size_t)input[2] << 8 | input[3];

		ensure_serving();
		input += 4;
		size -= 4;
		part = part < size ? part : size;
		if (ino == 255 && part >= 8)
			memcpy(&ino, input, 8);
		device.unique = 1000;
		if (opcode != RAW)
			device_send(&device, opcode, ino, input, part);
		else if (part)
			device_send_raw(&device, input, part);
		input += part;
		size -= part;
		check_answers();
	}
	return 0;
}
