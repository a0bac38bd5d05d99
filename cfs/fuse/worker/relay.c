/*
 * What is not hot goes to pyfuse3 as it is, over a SOCK_SEQPACKET pair; a thread writes each reply
 * to the device that the request was read from, because the kernel takes it from no other.
 *
 * Which device that was is in a table of fixed size: a slot belongs to whoever changes its unique
 * number, from 0 (free) before the request is sent, and back to 0 before its reply is written.  So
 * each request gets exactly one reply, whatever happens to pyfuse3 meanwhile.  Nothing waits: with
 * thousands of requests unanswered, and pyfuse3 stuck, the next ones fail with EAGAIN, so that hot
 * requests are always served.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "internal.h"

enum {
	NR_SLOTS = 4096, /* power of 2; about what SOCKET_SIZE has room for */
	SOCKET_SIZE = 4 * 1024 * 1024,
	REPLY_SIZE = sizeof(struct fuse_out_header) + CFS_DATA_SIZE,
	OUR_UNIQUE = 1 /* of the made-up INIT; the kernel's are even */
};

#define CLAIMED UINT64_MAX /* a slot whose unique number comes when its device is written */

struct slot {
	uint64_t unique;
	int fd;
};

struct cfs_relay {
	int fd;
	bool is_running; /* of who starts and stops */
	pthread_t thread;
	uint8_t *reply; /* the relay thread's */
	struct slot slots[NR_SLOTS];
};

int cfs_relay_init(struct cfs_worker *worker)
{
	struct cfs_relay *relay;
	int size = SOCKET_SIZE;
	int fd = worker->config.relay_fd;

	if (fd < 0)
		return 0;
	relay = calloc(1, sizeof(*relay));
	if (!relay)
		return -ENOMEM;
	relay->fd = fd;
	relay->reply = mmap(NULL, REPLY_SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (relay->reply == MAP_FAILED) {
		free(relay);
		return -ENOMEM;
	}
	worker->relay = relay;
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	return 0;
}

void cfs_relay_deinit(struct cfs_worker *worker)
{
	if (!worker->relay)
		return;
	munmap(worker->relay->reply, REPLY_SIZE);
	free(worker->relay);
}

static unsigned int first_slot(uint64_t unique)
{
	return (unsigned int)(unique >> 1) % NR_SLOTS; /* the kernel counts in steps of 2 */
}

static bool claim_slot(struct cfs_relay *relay, uint64_t unique, int fd)
{
	unsigned int i;

	for (i = 0; i < NR_SLOTS; i++) {
		struct slot *slot = &relay->slots[(first_slot(unique) + i) % NR_SLOTS];
		uint64_t expected = 0;

		if (__atomic_compare_exchange_n(&slot->unique, &expected, CLAIMED, false,
						__ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
			__atomic_store_n(&slot->fd, fd, __ATOMIC_RELAXED);
			__atomic_store_n(&slot->unique, unique, __ATOMIC_RELEASE);
			return true;
		}
	}
	return false;
}

/* Device of a request, whose slot is free from now on; -1: no such request, or answered. */
static int take_device(struct cfs_relay *relay, uint64_t unique)
{
	unsigned int i;

	for (i = 0; i < NR_SLOTS; i++) {
		struct slot *slot = &relay->slots[(first_slot(unique) + i) % NR_SLOTS];
		uint64_t expected = unique;
		int fd;

		if (__atomic_load_n(&slot->unique, __ATOMIC_ACQUIRE) != unique)
			continue;
		fd = __atomic_load_n(&slot->fd, __ATOMIC_RELAXED);
		if (__atomic_compare_exchange_n(&slot->unique, &expected, 0, false,
						__ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
			return fd;
	}
	return -1;
}

static int send_to_pyfuse3(const struct cfs_relay *relay, const void *message, size_t size)
{
	while (send(relay->fd, message, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

void cfs_relay_request(struct cfs_thread *thread)
{
	struct cfs_relay *relay = thread->worker->relay;
	uint64_t unique = cfs_header(thread)->unique;
	int ret;

	if (!relay) {
		cfs_reply_error(thread, ENOSYS);
		return;
	}
	if (!claim_slot(relay, unique, thread->fd)) {
		cfs_reply_error(thread, EAGAIN);
		return;
	}
	cfs_count(&cfs_counters(thread)->relayed, 1);
	ret = send_to_pyfuse3(relay, thread->in, thread->in_size);
	/* when pyfuse3 has gone, the relay thread may have taken the slot, and then it answers */
	if (ret && take_device(relay, unique) >= 0)
		cfs_reply_error(thread, ret == -EAGAIN ? EAGAIN : EIO);
}

static void reply_error(struct cfs_worker *worker, int fd, uint64_t unique)
{
	struct fuse_out_header header = {
		.len = sizeof(header),
		.error = -EIO,
		.unique = unique,
	};
	struct iovec only = { .iov_base = &header, .iov_len = sizeof(header) };

	cfs_write_reply(worker, fd, &only, 1);
}

/* A reply to a request, or a notification; the reply to our own INIT is dropped. */
static void pass_reply(struct cfs_worker *worker, size_t size)
{
	struct cfs_relay *relay = worker->relay;
	struct fuse_out_header header;
	struct iovec whole = { .iov_base = relay->reply, .iov_len = size };
	int fd;

	if (size < sizeof(header))
		return;
	memcpy(&header, relay->reply, sizeof(header));
	fd = header.unique ? take_device(relay, header.unique) : worker->config.device_fds[0];
	if (fd < 0)
		return;
	if (header.len != size)
		reply_error(worker, fd, header.unique);
	else if (header.unique)
		cfs_write_reply(worker, fd, &whole, 1);
	else
		cfs_write_message(worker, fd, &whole, 1);
}

/* pyfuse3 is gone: answer what waits for it.  A request not sent yet will fail in send(). */
static void answer_all(struct cfs_worker *worker)
{
	struct cfs_relay *relay = worker->relay;
	unsigned int i;

	for (i = 0; i < NR_SLOTS; i++) {
		uint64_t unique = __atomic_load_n(&relay->slots[i].unique, __ATOMIC_ACQUIRE);
		int fd = -1;

		if (unique && unique != CLAIMED)
			fd = take_device(relay, unique);
		if (fd >= 0)
			reply_error(worker, fd, unique);
	}
}

static void *carry_replies(void *argument)
{
	struct cfs_worker *worker = argument;
	struct cfs_relay *relay = worker->relay;
	struct pollfd fds[] = {
		{ .fd = relay->fd, .events = POLLIN },
		{ .fd = worker->stop_fd, .events = POLLIN },
	};
	ssize_t size;

	for (;;) {
		poll(fds, 2, -1);
		if (fds[1].revents)
			return NULL;
		size = recv(relay->fd, relay->reply, REPLY_SIZE, MSG_DONTWAIT);
		if (size > 0) {
			pass_reply(worker, (size_t)size);
		} else if (size == 0 || (errno != EAGAIN && errno != EINTR)) {
			answer_all(worker);
			return NULL;
		}
	}
}

/* pyfuse3 needs an INIT; the kernel's was answered before pyfuse3 was there. */
static int send_init(const struct cfs_relay *relay)
{
	struct {
		struct fuse_in_header header;
		struct fuse_init_in init;
	} message = {
		.header = { .len = sizeof(message), .opcode = FUSE_INIT, .unique = OUR_UNIQUE },
		.init = {
			.major = FUSE_KERNEL_VERSION,
			.minor = 38,
			.max_readahead = CFS_DATA_SIZE,
			.flags = 0x7fffffff, /* with fewer, pyfuse3 calls the kernel too old */
		},
	};

	return send_to_pyfuse3(relay, &message, sizeof(message));
}

int cfs_relay_start(struct cfs_worker *worker)
{
	struct cfs_relay *relay = worker->relay;
	int ret;

	if (!relay)
		return 0;
	ret = send_init(relay);
	if (!ret)
		ret = -pthread_create(&relay->thread, NULL, carry_replies, worker);
	relay->is_running = !ret;
	return ret;
}

/* After cfs_end_threads(). */
void cfs_relay_stop(struct cfs_worker *worker)
{
	struct cfs_relay *relay = worker->relay;

	if (!relay || !relay->is_running)
		return;
	pthread_join(relay->thread, NULL);
	relay->is_running = false;
}
