/*
 * Everything that is written to a device: replies and notifications, one writev each.
 */
#include <errno.h>
#include <poll.h>

#include "internal.h"

static struct iovec part(const void *data, size_t size)
{
	/* writev only reads */
	return (struct iovec){ .iov_base = (void *)(uintptr_t)data, .iov_len = size };
}

/* The kernel's device never makes a writer wait; a socket in its place (tests) does. */
static void wait_for_room(const struct cfs_worker *worker, int fd)
{
	struct pollfd fds[] = {
		{ .fd = fd, .events = POLLOUT },
		{ .fd = worker->stop_fd, .events = POLLIN },
	};

	poll(fds, 2, -1);
}

int cfs_write_message(struct cfs_worker *worker, int fd, const struct iovec *parts, int nr_parts)
{
	while (writev(fd, parts, nr_parts) < 0) {
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN || __atomic_load_n(&worker->is_ending, __ATOMIC_ACQUIRE))
			return -errno;
		wait_for_room(worker, fd);
	}
	return 0;
}

void cfs_write_reply(struct cfs_worker *worker, int fd, const struct iovec *parts, int nr_parts)
{
	struct fuse_out_header header = *(const struct fuse_out_header *)parts->iov_base;
	struct iovec only = part(&header, sizeof(header));
	int ret = cfs_write_message(worker, fd, parts, nr_parts);

	if (ret == 0)
		cfs_count(&worker->state->counters.replies, 1);
	/* interrupted or resent; unmounted; aborted: nobody waits for the reply */
	if (ret == 0 || ret == -ENOENT || ret == -ENODEV || ret == -ECONNABORTED)
		return;
	/* a lost reply leaves a process in uninterruptible sleep */
	header.len = sizeof(header);
	header.error = -EIO;
	cfs_write_message(worker, fd, &only, 1);
}

void cfs_reply_error(struct cfs_thread *thread, int error)
{
	struct fuse_out_header header = {
		.len = sizeof(header),
		.error = -error,
		.unique = cfs_header(thread)->unique,
	};
	struct iovec only = part(&header, sizeof(header));

	if (error)
		cfs_count(&cfs_counters(thread)->errors, 1);
	cfs_write_reply(thread->worker, thread->fd, &only, 1);
}

void cfs_reply(struct cfs_thread *thread, const void *data, size_t size)
{
	cfs_reply_parts(thread, data, size, NULL, 0);
}

void cfs_reply_parts(struct cfs_thread *thread, const void *first, size_t first_size,
		     const void *second, size_t second_size)
{
	struct fuse_out_header header = {
		.len = (uint32_t)(sizeof(header) + first_size + second_size),
		.unique = cfs_header(thread)->unique,
	};
	struct iovec parts[] = {
		part(&header, sizeof(header)),
		part(first, first_size),
		part(second, second_size),
	};

	cfs_write_reply(thread->worker, thread->fd, parts, second_size ? 3 : 2);
}

int cfs_notify(struct cfs_thread *thread, int32_t code, const void *head, size_t head_size,
	       const void *data, size_t data_size)
{
	struct fuse_out_header header = {
		.len = (uint32_t)(sizeof(header) + head_size + data_size),
		.error = code,
	};
	struct iovec parts[] = {
		part(&header, sizeof(header)),
		part(head, head_size),
		part(data, data_size),
	};

	return cfs_write_message(thread->worker, thread->fd, parts, 3);
}
