/*
 * News for Python: events, the reason of a failure, log lines.  The events are atomic; the ring of
 * the log and the failure have one lock, which only misses take.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

void cfs_raise_event(struct cfs_worker *worker, uint32_t events)
{
	uint64_t one = 1;

	__atomic_fetch_or(&worker->events, events, __ATOMIC_RELEASE);
	/* it can only fail when it is readable already */
	while (write(worker->config.event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

uint32_t cfs_worker_events(struct cfs_worker *worker)
{
	return __atomic_exchange_n(&worker->events, 0, __ATOMIC_ACQUIRE);
}

void cfs_fail(struct cfs_worker *worker, const char *reason)
{
	pthread_mutex_lock(&worker->log_lock);
	if (!worker->failure[0]) /* the first reason is the cause of the others */
		strncpy(worker->failure, reason, sizeof(worker->failure) - 1);
	pthread_mutex_unlock(&worker->log_lock);
	cfs_raise_event(worker, CFS_EVENT_FAILED);
	cfs_end_threads(worker);
}

const char *cfs_worker_failure(const struct cfs_worker *worker)
{
	return worker->failure;
}

static void set_object_path(const struct cfs_table *table, uint32_t ino,
			    struct cfs_log_entry *entry)
{
	uint32_t object = table->object[ino];
	size_t size;

	if (object == CFS_NO_OBJECT)
		return;
	size = table->object_path_size[object];
	if (size >= sizeof(entry->object))
		size = sizeof(entry->object) - 1;
	memcpy(entry->object, cfs_table_bytes(table, table->object_path_off[object]), size);
}

void cfs_log(struct cfs_worker *worker, uint32_t ino, uint32_t reason, int error, uint64_t value)
{
	struct cfs_log_entry entry = {
		.nid = worker->table.nid[ino],
		.value = value,
		.error = error,
		.reason = reason,
	};
	uint8_t before;

	before = __atomic_fetch_or(&worker->inode_flags[ino], CFS_FLAG_REPORTED, __ATOMIC_RELAXED);
	if (before & CFS_FLAG_REPORTED)
		return;
	set_object_path(&worker->table, ino, &entry);
	pthread_mutex_lock(&worker->log_lock);
	if (worker->log_count < CFS_NR_LOG_ENTRIES) {
		unsigned int end = (worker->log_start + worker->log_count) % CFS_NR_LOG_ENTRIES;

		worker->log[end] = entry;
		worker->log_count++;
	}
	pthread_mutex_unlock(&worker->log_lock);
	cfs_raise_event(worker, CFS_EVENT_LOG);
}

int cfs_worker_next_log(struct cfs_worker *worker, struct cfs_log_entry *entry)
{
	int has_entry;

	pthread_mutex_lock(&worker->log_lock);
	has_entry = worker->log_count > 0;
	if (has_entry) {
		*entry = worker->log[worker->log_start];
		worker->log_start = (worker->log_start + 1) % CFS_NR_LOG_ENTRIES;
		worker->log_count--;
	}
	pthread_mutex_unlock(&worker->log_lock);
	return has_entry;
}
