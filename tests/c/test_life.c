/*
 * Threads, sessions and the relay.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "harness.h"
#include "tests.h"
#include "tree.h"

enum { NR_THREADS = 4, NR_ROUNDS = 300, NR_AT_ONCE = 64 };

static struct device device;

static struct setup four_threads(const char *objects)
{
	return (struct setup){ .nr_threads = NR_THREADS, .objects = objects };
}

/* The request of a number; which answer it gets is known. */
static uint64_t send_numbered(unsigned int number)
{
	struct fuse_read_in read_in = { .offset = number * 997, .size = 512 };
	struct fuse_getattr_in getattr = { 0 };

	switch (number % 4) {
	case 0:
		return device_send(&device, FUSE_LOOKUP, TREE_BIG, "0007", 5);
	case 1:
		return device_send(&device, FUSE_READ, TREE_OBJECT, &read_in, sizeof(read_in));
	case 2:
		return device_send(&device, FUSE_READLINK, TREE_LINK, NULL, 0);
	default:
		return device_send(&device, FUSE_GETATTR, TREE_FIRST_FILE + number, &getattr,
				   sizeof(getattr));
	}
}

static void check_numbered(unsigned int number)
{
	const struct fuse_entry_out *entry = (const void *)device.reply;
	const struct fuse_attr_out *attr = (const void *)device.reply;

	switch (number % 4) {
	case 0:
		CHECK(entry->nodeid == TREE_FIRST_FILE + 7);
		break;
	case 1:
		CHECK(device.reply_size == 512);
		for (unsigned int at = 0; at < 512; at++)
			CHECK(device.reply[at] == tree_object_byte(number * 997 + at));
		break;
	case 2:
		CHECK(device.reply_size == strlen(tree_link_target));
		break;
	default:
		CHECK(attr->attr.ino == TREE_FIRST_FILE + number);
	}
}

static void test_four_threads_answer_each_request_once(const char *objects)
{
	struct setup setup = four_threads(objects);

	device_init(&device, &setup);
	for (unsigned int round = 0; round < NR_ROUNDS; round++) {
		uint64_t first = device.unique + 2;
		bool is_answered[NR_AT_ONCE] = { false };

		for (unsigned int number = 0; number < NR_AT_ONCE; number++)
			CHECK(send_numbered(number) == first + 2 * number);
		for (unsigned int nr_replies = 0; nr_replies < NR_AT_ONCE; nr_replies++) {
			uint64_t number;

			CHECK(device_receive(&device) == 0);
			number = (device.reply_unique - first) / 2;
			CHECK(number < NR_AT_ONCE && !is_answered[number]);
			is_answered[number] = true;
			check_numbered((unsigned int)number);
		}
	}
	device_check_serves(&device);
	device_close(&device);
}

static void test_one_request_at_a_time_with_four_threads(const char *objects)
{
	struct setup setup = four_threads(objects);

	device_init(&device, &setup);
	for (unsigned int number = 0; number < NR_ROUNDS * 8; number++) {
		send_numbered(number % NR_AT_ONCE);
		CHECK(device_receive(&device) == 0);
		check_numbered(number % NR_AT_ONCE);
	}
	device_close(&device);
}

static void test_stop_and_destroy_leave_no_descriptor(const char *objects)
{
	unsigned int before = nr_open_fds();

	for (unsigned int round = 0; round < 20; round++) {
		struct setup setup = four_threads(objects);

		device_init(&device, &setup);
		if (round % 2) { /* stopped in the middle of work */
			for (unsigned int number = 0; number < NR_AT_ONCE; number++)
				send_numbered(number);
		}
		device_close(&device);
		CHECK(nr_open_fds() == before);
	}
	device_open(&device, &(struct setup){ 0 }); /* stopped before INIT */
	device_close(&device);
	CHECK(nr_open_fds() == before);
}

static void test_next_session_asks_for_unanswered_requests(const char *objects)
{
	struct setup setup = four_threads(objects);
	struct cfs_state *state;

	device_init(&device, &setup);
	setup.state_fd = device_close_but_state(&device);
	device_open(&device, &setup);
	CHECK(device_receive(&device) == CFS_NOTIFY_RESEND);
	CHECK(wait_readable(device.event_fd, DEADLINE_MS));
	CHECK(cfs_worker_events(device.worker) & CFS_EVENT_SERVING);
	device.unique |= CFS_UNIQUE_RESEND;
	device_check_serves(&device);
	for (unsigned int number = 0; number < NR_AT_ONCE; number++) {
		send_numbered(number);
		CHECK(device_receive(&device) == 0);
		check_numbered(number);
	}
	state = mmap(NULL, sizeof(*state), PROT_READ, MAP_SHARED, device.state_fd, 0);
	CHECK(state != MAP_FAILED);
	CHECK(state->nr_sessions == 2 && state->is_negotiated && state->session_pid == getpid());
	CHECK(state->counters.requests[FUSE_INIT] == 1);
	CHECK(state->counters.requests[FUSE_LOOKUP] == NR_AT_ONCE / 4);
	munmap(state, sizeof(*state));
	device_close(&device);
}

static void test_bad_tables_and_states_are_refused(const char *objects)
{
	char why[256] = "";
	int sockets[2];
	int unsealed = memfd_create("table", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	struct cfs_config config = { .table_fd = unsealed, .relay_fd = -1, .nr_devices = 1,
				     .device_fds = sockets, .max_poll_us = UINT32_MAX };
	unsigned int before;

	(void)objects;
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets) == 0);
	config.state_fd = memfd_create("state", MFD_CLOEXEC);
	config.event_fd = sockets[1];
	CHECK(ftruncate(unsealed, 1 << 20) == 0);
	before = nr_open_fds();
	CHECK(!cfs_worker_create(&config, why, sizeof(why)) && why[0]);
	CHECK(fcntl(unsealed, F_ADD_SEALS,
		    F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0);
	why[0] = 0;
	CHECK(!cfs_worker_create(&config, why, sizeof(why)) && why[0]);
	close(unsealed);
	config.table_fd = tree_publish(true);
	CHECK(pwrite(config.state_fd, "not a state", 11, 0) == 11);
	why[0] = 0;
	CHECK(!cfs_worker_create(&config, why, sizeof(why)) && why[0]);
	CHECK(!cfs_worker_create(&config, why, 1) && !why[0]);
	CHECK(nr_open_fds() == before);
	close(config.table_fd);
	close(config.state_fd);
	close(sockets[0]);
	close(sockets[1]);
}

/* What pyfuse3 gets: the message, and its header in place. */
static ssize_t receive_relayed(uint8_t *message, size_t size)
{
	ssize_t received;

	CHECK(wait_readable(device.relay_fd, DEADLINE_MS));
	received = recv(device.relay_fd, message, size, 0);
	CHECK(received >= HEADER_SIZE);
	CHECK(((struct fuse_in_header *)(void *)message)->len == received);
	return received;
}

static void answer_relayed(uint64_t unique, int error, const void *data, size_t size)
{
	uint8_t message[1024];
	struct fuse_out_header header = { .len = (uint32_t)(sizeof(header) + size),
					  .error = error, .unique = unique };

	memcpy(message, &header, sizeof(header));
	if (size)
		memcpy(message + sizeof(header), data, size);
	CHECK(send(device.relay_fd, message, header.len, 0) == (ssize_t)header.len);
}

static void begin_with_relay(void)
{
	_Alignas(8) uint8_t message[1024];
	struct fuse_in_header *header = (void *)message;
	struct fuse_init_in *init = (void *)(header + 1);
	struct fuse_init_out out = { .major = 7, .minor = 31, .max_write = 4096 };
	struct setup setup = { .nr_threads = NR_THREADS, .with_relay = true };

	device_init(&device, &setup);
	receive_relayed(message, sizeof(message));
	CHECK(header->opcode == FUSE_INIT && init->major == 7);
	answer_relayed(header->unique, 0, &out, sizeof(out));
}

static void test_relayed_requests(const char *objects)
{
	_Alignas(8) uint8_t message[1024];
	struct fuse_in_header *header = (void *)message;
	uint64_t uniques[40];

	(void)objects;
	begin_with_relay();
	for (unsigned int index = 0; index < 40; index++)
		uniques[index] = device_send(&device, FUSE_BMAP, TREE_INLINE, "some argument", 14);
	for (unsigned int index = 0; index < 40; index++) {
		CHECK(receive_relayed(message, sizeof(message)) == HEADER_SIZE + 14);
		CHECK(header->opcode == FUSE_BMAP && header->nodeid == TREE_INLINE);
		CHECK(memcmp(header + 1, "some argument", 14) == 0);
	}
	device_check_serves(&device); /* while pyfuse3 has not answered */
	for (unsigned int index = 40; index--;) {
		answer_relayed(uniques[index], index % 2 ? -ENOTTY : 0, "data", index % 2 ? 0 : 4);
		CHECK(device_receive(&device) == (index % 2 ? -ENOTTY : 0));
		CHECK(device.reply_unique == uniques[index]);
		CHECK(device.reply_size == (index % 2 ? 0 : 4));
	}
	device_close(&device);
}

static void test_strange_answers_of_the_relay_harm_nobody(const char *objects)
{
	_Alignas(8) uint8_t message[1024] = { 0 };
	uint64_t unique;

	(void)objects;
	begin_with_relay();
	answer_relayed(0x123456, 0, "nobody asked", 12);
	answer_relayed(UINT64_MAX, -EIO, NULL, 0);
	CHECK(send(device.relay_fd, message, 3, 0) == 3);
	CHECK(send(device.relay_fd, message, 1024, 0) == 1024);
	unique = device_send(&device, FUSE_BMAP, TREE_ROOT, "x", 2);
	receive_relayed(message, sizeof(message));
	answer_relayed(unique, -ENOTTY, NULL, 0);
	do {
		device_receive(&device);
	} while (device.reply_unique != unique);
	device_check_serves(&device);
	device_close(&device);
}

static void test_relayed_requests_end_when_the_peer_has_gone(const char *objects)
{
	_Alignas(8) uint8_t message[1024];

	(void)objects;
	begin_with_relay();
	device_send(&device, FUSE_BMAP, TREE_ROOT, "x", 2);
	receive_relayed(message, sizeof(message));
	CHECK(shutdown(device.relay_fd, SHUT_RDWR) == 0);
	CHECK(device_receive(&device) < 0); /* the one that it had */
	CHECK(device_call(&device, FUSE_BMAP, TREE_ROOT, "x", 2) != 0);
	device_check_serves(&device);
	device_close(&device);
}

static void test_without_relay_the_rest_is_enosys(const char *objects)
{
	(void)objects;
	device_init(&device, &(struct setup){ 0 });
	CHECK(device_call(&device, FUSE_BMAP, TREE_ROOT, "x", 2) == ENOSYS);
	CHECK(device_call(&device, 60, TREE_ROOT, "x", 2) == ENOSYS);
	device_close(&device);
}

const struct test life_tests[] = {
	{ "four threads answer each request once", test_four_threads_answer_each_request_once },
	{ "one request at a time with four threads", test_one_request_at_a_time_with_four_threads },
	{ "stop and destroy leave no descriptor", test_stop_and_destroy_leave_no_descriptor },
	{ "next session asks for unanswered requests",
	  test_next_session_asks_for_unanswered_requests },
	{ "bad tables and states are refused", test_bad_tables_and_states_are_refused },
	{ "relayed requests", test_relayed_requests },
	{ "strange answers of the relay harm nobody",
	  test_strange_answers_of_the_relay_harm_nobody },
	{ "relayed requests end when the peer has gone",
	  test_relayed_requests_end_when_the_peer_has_gone },
	{ "without relay the rest is enosys", test_without_relay_the_rest_is_enosys },
	{ 0 },
};
