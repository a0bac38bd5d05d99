#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tree.h"

enum { WANTED_BUFFER = 4 * 1024 * 1024, BUFFER_OVERHEAD = 32 * 1024 };

static void make_pair(int fds[2], size_t *max_message)
{
	int wanted = WANTED_BUFFER;
	int size = 0;
	socklen_t length = sizeof(size);

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds))
		err(2, "socketpair");
	for (int end = 0; end < 2; end++)
		if (setsockopt(fds[end], SOL_SOCKET, SO_SNDBUFFORCE, &wanted, sizeof(wanted)))
			setsockopt(fds[end], SOL_SOCKET, SO_SNDBUF, &wanted, sizeof(wanted));
	if (getsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &size, &length))
		err(2, "getsockopt");
	*max_message = (size_t)size / 2 - BUFFER_OVERHEAD; /* the kernel reports it doubled */
}

static void set_nonblocking(int fd)
{
	if (fcntl(fd, F_SETFL, O_NONBLOCK))
		err(2, "fcntl");
}

static void make_descriptors(struct device *device, const struct setup *setup)
{
	int fds[2];
	size_t ignored;

	make_pair(fds, &device->max_reply);
	device->kernel_fd = fds[0];
	set_nonblocking(fds[1]);
	device->fds[0] = fds[1];
	device->nr_threads = setup->nr_threads ? setup->nr_threads : 1;
	for (unsigned int index = 1; index < device->nr_threads; index++)
		device->fds[index] = fcntl(fds[1], F_DUPFD_CLOEXEC, 0);
	device->relay_fd = device->relay_inner_fd = -1;
	if (setup->with_relay) {
		make_pair(fds, &ignored);
		device->relay_fd = fds[0];
		device->relay_inner_fd = fds[1];
	}
	device->table_fd = setup->table_fd ? setup->table_fd : tree_publish(!setup->without_xattrs);
	device->state_fd = setup->state_fd ? setup->state_fd : memfd_create("state", MFD_CLOEXEC);
	device->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	device->objects_fd = setup->objects ? tree_make_objects(setup->objects) : -1;
}

void device_open(struct device *device, const struct setup *setup)
{
	char why[256] = "";
	struct cfs_config config;

	memset(device, 0, sizeof(*device));
	make_descriptors(device, setup);
	config = (struct cfs_config){
		.table_fd = device->table_fd,
		.state_fd = device->state_fd,
		.relay_fd = device->relay_inner_fd,
		.event_fd = device->event_fd,
		.nr_devices = device->nr_threads,
		.nr_object_dirs = setup->objects ? 1 : 0,
		.device_fds = device->fds,
		.object_dirs = &device->objects_fd,
		.masked_flags = setup->masked_flags,
		.max_poll_us = UINT32_MAX,
	};
	device->worker = cfs_worker_create(&config, why, sizeof(why));
	if (!device->worker)
		errx(2, "cfs_worker_create: %s", why);
	CHECK(cfs_worker_start(device->worker) == 0);
}

void device_init(struct device *device, const struct setup *setup)
{
	device_open(device, setup);
	CHECK(device_send_init(device, CFS_FUSE_MINOR, ALL_FLAGS));
	CHECK(wait_readable(device->event_fd, DEADLINE_MS));
	CHECK(cfs_worker_events(device->worker) & CFS_EVENT_SERVING);
}

int device_close_but_state(struct device *device)
{
	cfs_worker_stop(device->worker);
	cfs_worker_destroy(device->worker);
	for (unsigned int index = 0; index < device->nr_threads; index++)
		close(device->fds[index]);
	close(device->kernel_fd);
	close(device->table_fd);
	close(device->event_fd);
	if (device->relay_fd >= 0) {
		close(device->relay_fd);
		close(device->relay_inner_fd);
	}
	if (device->objects_fd >= 0)
		close(device->objects_fd);
	return device->state_fd;
}

void device_close(struct device *device)
{
	close(device_close_but_state(device));
}

bool wait_readable(int fd, int deadline_ms)
{
	struct pollfd wanted = { .fd = fd, .events = POLLIN };

	int nr_ready;

	do {
		nr_ready = poll(&wanted, 1, deadline_ms);
	} while (nr_ready < 0 && errno == EINTR); /* libFuzzer's own clock */
	return nr_ready == 1;
}

void device_send_raw(struct device *device, const void *message, size_t size)
{
	if (send(device->kernel_fd, message, size, MSG_NOSIGNAL) != (ssize_t)size)
		err(2, "send");
}

uint64_t device_send(struct device *device, uint32_t opcode, uint64_t ino, const void *argument,
		     size_t size)
{
	static uint8_t message[CFS_IN_SIZE];
	struct fuse_in_header header = {
		.len = (uint32_t)(HEADER_SIZE + size),
		.opcode = opcode,
		.unique = device->unique += 2,
		.nodeid = ino,
		.pid = 1,
	};

	CHECK(HEADER_SIZE + size <= sizeof(message));
	memcpy(message, &header, HEADER_SIZE);
	if (size)
		memcpy(message + HEADER_SIZE, argument, size);
	device_send_raw(device, message, HEADER_SIZE + size);
	return device->unique;
}

int device_receive(struct device *device)
{
	struct fuse_out_header header;
	struct iovec parts[2] = {
		{ .iov_base = &header, .iov_len = sizeof(header) },
		{ .iov_base = device->reply, .iov_len = sizeof(device->reply) },
	};
	ssize_t size;

	CHECK(wait_readable(device->kernel_fd, DEADLINE_MS));
	size = readv(device->kernel_fd, parts, 2);
	CHECK(size >= (ssize_t)sizeof(header));
	CHECK(header.len == size);
	device->reply_size = (size_t)size - sizeof(header);
	device->reply_unique = header.unique;
	if (header.error > 0) { /* a notification: its code */
		CHECK(header.unique == 0);
	} else if (header.error) {
		CHECK(header.error > -512 && !device->reply_size);
	}
	return header.error;
}

int device_call(struct device *device, uint32_t opcode, uint64_t ino, const void *argument,
		size_t size)
{
	uint64_t unique = device_send(device, opcode, ino, argument, size);
	int error;

	do {
		error = device_receive(device);
	} while (error > 0);
	CHECK(device->reply_unique == unique);
	return -error;
}

int device_call_name(struct device *device, uint32_t opcode, uint64_t ino, const char *name)
{
	return device_call(device, opcode, ino, name, strlen(name) + 1);
}

bool device_send_init(struct device *device, uint32_t minor, uint64_t flags)
{
	struct fuse_init_in init = {
		.major = FUSE_KERNEL_VERSION,
		.minor = minor,
		.max_readahead = 131072,
		.flags = (uint32_t)flags,
		.flags2 = (uint32_t)(flags >> 32),
	};

	return device_call(device, FUSE_INIT, 0, &init, sizeof(init)) == 0;
}

void device_check_serves(struct device *device)
{
	struct fuse_getattr_in wanted = { 0 };
	struct fuse_attr_out *out = (void *)device->reply;

	CHECK(device_call(device, FUSE_GETATTR, TREE_ROOT, &wanted, sizeof(wanted)) == 0);
	CHECK(device->reply_size == sizeof(*out));
	CHECK(out->attr.ino == TREE_ROOT);
	while (wait_readable(device->kernel_fd, 0))
		CHECK(device_receive(device) > 0);
}

unsigned int nr_open_fds(void)
{
	DIR *directory = opendir("/proc/self/fd");
	unsigned int count = 0;

	if (!directory)
		err(2, "/proc/self/fd");
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}
