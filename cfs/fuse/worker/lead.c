/*
 * Leader and followers, and adaptive polling (spec fuse-data-plane 13).
 *
 * One thread, the leader, touches the device; the others wait on a futex, because a second reader
 * would be woken by each request for nothing.  A leader that finds the queue empty either sleeps,
 * and pays for being woken, or asks again and again for a while, and takes the CPU from its
 * clients.  Which is better depends on what else the machine does, and polling tells by itself: with
 * a CPU to spare the next request is there within some 40 us, without one it comes when we have
 * gone to sleep.  So polling goes on while it finds requests, and pauses when it fails too often,
 * the longer the more often in a row that happens.
 *
 * Of struct cfs_lead, word and nr_waiting are atomic; the rest belongs to the leader.
 */
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum { FREE, TAKEN, AWAITED }; /* values of word */

enum {
	POLL_NS = 80000, /* longest polling after a reply: three or four wake-ups */
	/* a failure costs as much as some successes gain */
	MAX_CREDIT = 16,
	START_CREDIT = 8,
	FAILURE_COST = 8,
	/* in waits */
	MIN_PAUSE = 32,
	MAX_PAUSE = 512
};

struct cfs_lead {
	uint32_t word;
	uint32_t nr_waiting;
	/* the leader's */
	uint64_t poll_ns;
	int32_t credit; /* a pause when it falls below 0 */
	uint32_t pause; /* the next one */
	uint32_t nr_paused; /* waits until polling is tried again */
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int cfs_lead_init(struct cfs_worker *worker)
{
	uint32_t max_poll_us = worker->config.max_poll_us;
	struct cfs_lead *lead = calloc(1, sizeof(*lead));

	if (!lead)
		return -ENOMEM;
	lead->poll_ns = max_poll_us == UINT32_MAX ? POLL_NS : max_poll_us * (uint64_t)1000;
	lead->credit = START_CREDIT;
	lead->pause = MIN_PAUSE;
	worker->lead = lead;
	return 0;
}

void cfs_lead_deinit(struct cfs_worker *worker)
{
	free(worker->lead);
}

static bool is_ending(const struct cfs_worker *worker)
{
	return __atomic_load_n(&worker->is_ending, __ATOMIC_ACQUIRE);
}

void cfs_end_threads(struct cfs_worker *worker)
{
	uint64_t one = 1;

	__atomic_store_n(&worker->is_ending, true, __ATOMIC_RELEASE);
	/* never read, so it stays readable: whoever takes the lead next sees it as well */
	while (write(worker->stop_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void futex(uint32_t *word, int operation, uint32_t value)
{
	syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void take_lead(struct cfs_thread *thread)
{
	struct cfs_lead *lead = thread->worker->lead;
	uint32_t expected = FREE;

	if (thread->is_leader)
		return;
	if (!__atomic_compare_exchange_n(&lead->word, &expected, TAKEN, false, __ATOMIC_ACQUIRE,
					 __ATOMIC_RELAXED)) {
		__atomic_fetch_add(&lead->nr_waiting, 1, __ATOMIC_RELAXED);
		while (__atomic_exchange_n(&lead->word, AWAITED, __ATOMIC_ACQUIRE) != FREE)
			futex(&lead->word, FUTEX_WAIT, AWAITED);
		__atomic_fetch_sub(&lead->nr_waiting, 1, __ATOMIC_RELAXED);
	}
	thread->is_leader = true;
}

void cfs_hand_over(struct cfs_thread *thread)
{
	struct cfs_lead *lead = thread->worker->lead;

	if (!thread->is_leader)
		return;
	thread->is_leader = false;
	if (__atomic_exchange_n(&lead->word, FREE, __ATOMIC_RELEASE) == AWAITED) {
		cfs_count(&cfs_counters(thread)->handovers, 1);
		futex(&lead->word, FUTEX_WAKE, 1);
	}
}

/* Is it worth waking a follower before this request is answered? */
static bool has_more(const struct cfs_thread *thread)
{
	struct pollfd device = { .fd = thread->fd, .events = POLLIN };

	return __atomic_load_n(&thread->worker->lead->nr_waiting, __ATOMIC_RELAXED) > 0 &&
	       poll(&device, 1, 0) > 0;
}

/* Whether to poll in this wait. */
static bool wants_to_poll(struct cfs_lead *lead)
{
	if (lead->nr_paused > 0) {
		lead->nr_paused--;
		return false;
	}
	return lead->poll_ns > 0;
}

static void note_poll(struct cfs_lead *lead, bool has_found)
{
	if (has_found) {
		if (lead->credit < MAX_CREDIT && ++lead->credit == MAX_CREDIT)
			lead->pause = MIN_PAUSE;
		return;
	}
	lead->credit -= FAILURE_COST;
	if (lead->credit >= 0)
		return;
	lead->credit = START_CREDIT;
	lead->nr_paused = lead->pause;
	lead->pause = lead->pause < MAX_PAUSE ? 2 * lead->pause : MAX_PAUSE;
}

static void sleep_for_request(const struct cfs_thread *thread)
{
	struct pollfd fds[] = {
		{ .fd = thread->fd, .events = POLLIN },
		{ .fd = thread->worker->stop_fd, .events = POLLIN },
	};

	cfs_count(&cfs_counters(thread)->sleeps, 1);
	poll(fds, 2, -1);
}

/* Size of a message, or -errno; -ENODEV when the device is at its end, -EAGAIN without one. */
static ssize_t read_message(const struct cfs_thread *thread)
{
	ssize_t size;

	do {
		size = read(thread->fd, thread->in, CFS_IN_SIZE);
	} while (size < 0 && (errno == EINTR || errno == ENOENT || errno == ENOMEM));
	if (size < 0)
		return -errno;
	return size ? size : -ENODEV; /* a socket (tests) ends like a file */
}

/* Ask for a message again and again: its size, or -errno; -EAGAIN if none came. */
static ssize_t poll_for_message(const struct cfs_thread *thread)
{
	struct cfs_lead *lead = thread->worker->lead;
	uint64_t until = now_ns() + lead->poll_ns;
	ssize_t size;

	do {
		if (is_ending(thread->worker))
			return -ECANCELED;
		size = read_message(thread);
	} while (size == -EAGAIN && now_ns() < until);
	note_poll(lead, size > 0);
	if (size > 0)
		cfs_count(&cfs_counters(thread)->polls, 1);
	return size;
}

/* Wait until a message is there: its size, or -errno; -ECANCELED when the threads shall end. */
static ssize_t wait_for_message(const struct cfs_thread *thread)
{
	ssize_t size = -EAGAIN;

	if (wants_to_poll(thread->worker->lead))
		size = poll_for_message(thread);
	while (size == -EAGAIN) {
		if (is_ending(thread->worker))
			return -ECANCELED;
		sleep_for_request(thread);
		size = read_message(thread);
	}
	return size;
}

/* Sound as a message; otherwise it got the only answer it can have. */
static bool check_message(struct cfs_thread *thread)
{
	const struct fuse_in_header *header = cfs_header(thread);

	if (thread->in_size < sizeof(*header))
		return false;
	if (header->len == thread->in_size)
		return true;
	if (header->opcode != FUSE_FORGET && header->opcode != FUSE_BATCH_FORGET &&
	    header->opcode != FUSE_INTERRUPT)
		cfs_reply_error(thread, EIO);
	return false;
}

bool cfs_receive(struct cfs_thread *thread)
{
	ssize_t size;

	take_lead(thread);
	do {
		if (is_ending(thread->worker))
			break;
		size = read_message(thread);
		if (size == -EAGAIN)
			size = wait_for_message(thread);
		if (size < 0) {
			if (size != -ECANCELED)
				cfs_raise_event(thread->worker, CFS_EVENT_ENDED);
			cfs_end_threads(thread->worker);
			break;
		}
		thread->in_size = (size_t)size;
		if (check_message(thread)) {
			if (has_more(thread))
				cfs_hand_over(thread);
			return true;
		}
	} while (true);
	cfs_hand_over(thread);
	return false;
}
