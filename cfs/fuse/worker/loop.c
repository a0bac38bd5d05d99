/*
 * The worker's threads, one for each device descriptor: receive, dispatch; start and end.
 *
 * cfs_worker_create(), _start(), _stop() and _destroy() are called by one thread of Python.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "backing.h"

enum { PAGE_SIZE = 4096, BUFFERS_SIZE = CFS_IN_SIZE + CFS_DATA_SIZE };

_Static_assert(CFS_IN_SIZE % PAGE_SIZE == 0, "data is page aligned");

/* A copy, because the caller's array need not outlive cfs_worker_create(). */
static int copy_fds(const int32_t **fds, uint32_t nr_fds)
{
	int32_t *copy = calloc(nr_fds + (size_t)1, sizeof(*copy));

	if (!copy)
		return -ENOMEM;
	if (nr_fds)
		memcpy(copy, *fds, nr_fds * sizeof(*copy));
	*fds = copy;
	return 0;
}

static int copy_config(struct cfs_worker *worker, const struct cfs_config *config)
{
	int ret;

	worker->config = *config;
	worker->config.object_dirs = NULL; /* until they are ours to free */
	ret = copy_fds(&worker->config.device_fds, config->nr_devices);
	if (ret) {
		worker->config.device_fds = NULL;
		return ret;
	}
	worker->config.object_dirs = config->object_dirs;
	ret = copy_fds(&worker->config.object_dirs, config->nr_object_dirs);
	if (ret)
		worker->config.object_dirs = NULL;
	return ret;
}

/*
 * Buffers are pre-faulted and locked as far as RLIMIT_MEMLOCK goes: a session killed while the
 * kernel faults one in can cost a request (spec fuse-data-plane 8).
 */
static int thread_init(struct cfs_worker *worker, unsigned int index)
{
	struct cfs_thread *thread = &worker->threads[index];
	uint8_t *buffers;

	buffers = mmap(NULL, BUFFERS_SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (buffers == MAP_FAILED)
		return -errno;
	mlock(buffers, CFS_IN_SIZE);
	mlock(buffers + CFS_IN_SIZE, CFS_DATA_SIZE);
	thread->worker = worker;
	thread->index = index;
	thread->fd = worker->config.device_fds[index];
	thread->in = buffers;
	thread->data = buffers + CFS_IN_SIZE;
	return 0;
}

static int threads_init(struct cfs_worker *worker)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; i < worker->config.nr_devices && !ret; i++)
		ret = thread_init(worker, i);
	return ret;
}

static int worker_init(struct cfs_worker *worker, const struct cfs_config *config,
		       const char **why)
{
	int ret;

	pthread_mutex_init(&worker->log_lock, NULL);
	worker->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	*why = "devices: expected 1 to 16 of them";
	if (config->nr_devices < 1 || config->nr_devices > CFS_MAX_THREADS)
		return -EINVAL;
	*why = "out of memory or descriptors";
	if (worker->stop_fd < 0)
		return -errno;
	ret = copy_config(worker, config);
	if (ret)
		return ret;
	ret = cfs_table_attach(worker->config.table_fd, &worker->table, why);
	if (ret)
		return ret;
	ret = cfs_state_attach(worker, why);
	if (ret)
		return ret;
	*why = "cannot prepare the worker";
	ret = threads_init(worker);
	if (!ret)
		ret = cfs_lead_init(worker);
	if (!ret)
		ret = cfs_objects_init(worker);
	if (!ret)
		ret = cfs_relay_init(worker);
	return ret;
}

struct cfs_worker *cfs_worker_create(const struct cfs_config *config, char *why, size_t why_size)
{
	struct cfs_worker *worker = calloc(1, sizeof(*worker));
	const char *reason = "out of memory";
	int ret = -ENOMEM;

	if (worker) {
		ret = worker_init(worker, config, &reason);
		if (!ret)
			return worker;
		cfs_worker_destroy(worker);
	}
	if (ret == -EINVAL)
		snprintf(why, why_size, "%s", reason);
	else
		snprintf(why, why_size, "%s: %s", reason, strerror(-ret));
	return NULL;
}

void cfs_worker_destroy(struct cfs_worker *worker)
{
	unsigned int i;

	cfs_relay_deinit(worker);
	if (worker->has_ended_pushes)
		pthread_mutex_unlock(&worker->objects->push_lock);
	if (worker->objects)
		cfs_objects_deinit(worker);
	cfs_lead_deinit(worker);
	for (i = 0; i < CFS_MAX_THREADS; i++)
		if (worker->threads[i].in)
			munmap(worker->threads[i].in, BUFFERS_SIZE);
	cfs_state_detach(worker);
	if (worker->table.map)
		cfs_table_detach(&worker->table);
	free((void *)(uintptr_t)worker->config.device_fds);
	free((void *)(uintptr_t)worker->config.object_dirs);
	if (worker->stop_fd >= 0)
		close(worker->stop_fd);
	pthread_mutex_destroy(&worker->log_lock);
	free(worker);
}

static void *serve(void *argument)
{
	struct cfs_thread *thread = argument;

	while (cfs_receive(thread))
		cfs_dispatch(thread);
	return NULL;
}

/* Requests that a dead session had read come back to the queue, from all descriptors. */
static void ask_for_unanswered(struct cfs_worker *worker)
{
	/* kernels before 6.9 refuse: the supervisor does not come here then */
	cfs_notify(&worker->threads[0], CFS_NOTIFY_RESEND, NULL, 0, NULL, 0);
}

static int start_threads(struct cfs_worker *worker)
{
	int ret = cfs_relay_start(worker);
	unsigned int i;

	for (i = 0; i < worker->config.nr_devices && !ret; i++) {
		ret = -pthread_create(&worker->threads[i].thread, NULL, serve,
				      &worker->threads[i]);
		worker->nr_running += !ret;
	}
	return ret;
}

int cfs_worker_start(struct cfs_worker *worker)
{
	struct cfs_state *state = worker->state;
	sigset_t all, before;
	int ret;

	/* before it dumps core a process waits for all its threads, and a push may hang for ever */
	if (!worker->has_ended_pushes)
		prctl(PR_SET_DUMPABLE, 0);
	__atomic_store_n(&state->session_pid, getpid(), __ATOMIC_RELAXED);
	if (__atomic_fetch_add(&state->nr_sessions, 1, __ATOMIC_ACQ_REL) > 0)
		ask_for_unanswered(worker);
	if (__atomic_load_n(&state->is_negotiated, __ATOMIC_ACQUIRE)) {
		cfs_apply_negotiated(worker);
		cfs_raise_event(worker, CFS_EVENT_SERVING);
	}
	/* signals are Python's */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = start_threads(worker);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (ret)
		cfs_worker_stop(worker);
	return ret;
}

void cfs_worker_end_pushes(struct cfs_worker *worker)
{
	if (!worker->has_ended_pushes)
		pthread_mutex_lock(&worker->objects->push_lock);
	worker->has_ended_pushes = true;
}

void cfs_worker_stop(struct cfs_worker *worker)
{
	/* who pushes needs the others, to answer what it waits for */
	cfs_worker_end_pushes(worker);
	cfs_end_threads(worker);
	while (worker->nr_running > 0)
		pthread_join(worker->threads[--worker->nr_running].thread, NULL);
	cfs_relay_stop(worker);
}
