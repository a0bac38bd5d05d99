/*
 * A worker on a socket pair in place of the FUSE device: it reads requests from any descriptor.
 * Clones of the device are duplicates here, which share one queue as clones do.
 */
#ifndef CFS_TEST_HARNESS_H
#define CFS_TEST_HARNESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "internal.h"

#define CHECK(condition)                                                             \
	do {                                                                         \
		if (!(condition)) {                                                  \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			abort();                                                     \
		}                                                                    \
	} while (0)

enum { DEADLINE_MS = 20000, HEADER_SIZE = sizeof(struct fuse_in_header) };

/* Everything that the kernel of the spec offers. */
#define ALL_FLAGS (~0ull & ~(1ull << 36) & ~(1ull << 35))

struct setup {
	unsigned int nr_threads; /* 0: one */
	bool without_xattrs;
	bool with_relay;
	int state_fd; /* of an earlier session, or 0 */
	int table_fd; /* instead of the tree, or 0 */
	uint64_t masked_flags;
	const char *objects; /* directory, or NULL */
};

struct device {
	struct cfs_worker *worker;
	int kernel_fd; /* where the kernel would be */
	int relay_fd; /* where pyfuse3 would be, or -1 */
	int fds[CFS_MAX_THREADS];
	unsigned int nr_threads;
	int table_fd;
	int state_fd;
	int event_fd;
	int objects_fd;
	int relay_inner_fd;
	uint64_t unique; /* of the last request */
	size_t max_reply; /* what the socket carries */
	/* The last reply without its header. */
	uint8_t reply[CFS_DATA_SIZE + 4096];
	size_t reply_size;
	uint64_t reply_unique;
};

/* Make, create and start; device_init() sends INIT as well and waits until the worker serves. */
void device_open(struct device *device, const struct setup *setup);
void device_init(struct device *device, const struct setup *setup);

/* Stop and destroy the worker, then close; the state lives on if keep_state. */
void device_close(struct device *device);
int device_close_but_state(struct device *device);

/* Send as it is. */
void device_send_raw(struct device *device, const void *message, size_t size);

/* Send with a header; the unique. */
uint64_t device_send(struct device *device, uint32_t opcode, uint64_t ino, const void *argument,
		     size_t size);

/* The next message from the worker; its error (0 or negative), or the code of a notification. */
int device_receive(struct device *device);

/* Send, receive, check that the reply is this request's; its error, positive.  Notifications are
 * passed over. */
int device_call(struct device *device, uint32_t opcode, uint64_t ino, const void *argument,
		size_t size);

/* The same with a name as argument. */
int device_call_name(struct device *device, uint32_t opcode, uint64_t ino, const char *name);

/* Wait until readable; false after the deadline. */
bool wait_readable(int fd, int deadline_ms);

/* INIT as the kernel sends it; false if it was refused. */
bool device_send_init(struct device *device, uint32_t minor, uint64_t flags);

/* A GETATTR is answered, and nothing else is waiting but notifications. */
void device_check_serves(struct device *device);

unsigned int nr_open_fds(void);

#endif
