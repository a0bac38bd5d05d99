/*
 * Leader and followers, and adaptive polling (spec fuse-data-plane 13).
 *
 * One thread, the leader, touches the device; the others wait on a futex, because a second reader
 * would be woken by each request for nothing.  A leader that finds the queue empty either sleeps,
 * and pays for being woken, or asks again and again for a while, and takes the CPU from its
 * clients.  Which is better depends on what else the machine does: now and then it tries both in
 * turn, for some requests each, and keeps the one with which they took less time.  Not only waits
 * are compared: who polls on a busy machine pays by losing the CPU at any other moment.
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
	POLL_NS = 120000, /* longest polling after a reply: about five wake-ups */
	IDLE_NS = 500000, /* what a wait exceeds this by is the client's own time */
	EPOCH_REQUESTS = 32,
	MIN_EPOCHS = 4, /* of a comparison, polling in every other one */
	MAX_EPOCHS = 16,
	LOOK_NS = 500000000 /* between comparisons, which cost some ms at most */
};

struct cfs_lead {
	uint32_t word;
	uint32_t nr_waiting;
	/* the leader's */
	uint64_t poll_ns;
	bool is_polling;
	bool is_comparing;
	uint32_t nr_requests; /* in this epoch */
	uint32_t nr_epochs;
	uint64_t epoch_start_ns; /* later by what was idle since */
	uint64_t spent_ns[2]; /* without and with polling */
	uint64_t compare_at_ns;
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
	lead->compare_at_ns = lead->poll_ns ? 0 : UINT64_MAX;
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

static void start_comparing(struct cfs_lead *lead, uint64_t now)
{
	lead->is_comparing = true;
	lead->nr_requests = 0;
	lead->nr_epochs = 0;
	lead->epoch_start_ns = now;
	lead->spent_ns[false] = 0;
	lead->spent_ns[true] = 0;
}

/* After as many epochs with polling as without: choose, early if the difference is clear. */
static void try_to_choose(struct cfs_lead *lead, uint64_t now)
{
	uint64_t asleep = lead->spent_ns[false], polling = lead->spent_ns[true];
	bool is_clear = 2 * polling >= 3 * asleep || 2 * asleep >= 3 * polling;

	if (lead->nr_epochs < (is_clear ? MIN_EPOCHS : MAX_EPOCHS))
		return;
	lead->is_comparing = false;
	lead->compare_at_ns = now + LOOK_NS;
	/* polling costs CPU time: it has to be clearly better */
	lead->is_polling = polling < asleep / 10 * 9;
}

/* A request has been read. */
static void note_request(struct cfs_lead *lead)
{
	uint64_t now;

	if (!lead->is_comparing || ++lead->nr_requests < EPOCH_REQUESTS)
		return;
	now = now_ns();
	lead->spent_ns[lead->is_polling] += now - lead->epoch_start_ns;
	lead->nr_requests = 0;
	lead->epoch_start_ns = now;
	lead->is_polling = !lead->is_polling;
	if (++lead->nr_epochs % 2 == 0)
		try_to_choose(lead, now);
}

/* The queue was empty at start, and is no longer. */
static void note_wait(struct cfs_lead *lead, uint64_t start)
{
	uint64_t now = now_ns();

	if (lead->is_comparing && now - start > IDLE_NS)
		lead->epoch_start_ns += now - start - IDLE_NS;
	else if (!lead->is_comparing && now >= lead->compare_at_ns)
		start_comparing(lead, now);
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
	} while (size < 0 && (errno == EINTR || errno == ENOENT));
	if (size < 0)
		return -errno;
	return size ? size : -ENODEV; /* a socket (tests) ends like a file */
}

/* Wait until a message is there: its size, or -errno; -ECANCELED when the threads shall end. */
static ssize_t wait_for_message(const struct cfs_thread *thread)
{
	struct cfs_lead *lead = thread->worker->lead;
	uint64_t start = now_ns();
	uint64_t until = lead->is_polling ? start + lead->poll_ns : start;
	bool has_slept = false;
	ssize_t size;

	do {
		if (is_ending(thread->worker))
			return -ECANCELED;
		if (now_ns() >= until) {
			sleep_for_request(thread);
			has_slept = true;
		}
		size = read_message(thread);
	} while (size == -EAGAIN);
	if (size > 0) {
		note_wait(lead, start);
		if (!has_slept)
			cfs_count(&cfs_counters(thread)->polls, 1);
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
		note_request(thread->worker->lead);
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
