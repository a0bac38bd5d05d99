/*
 * The tree on a real mount, by four threads on clones of the device, without pyfuse3: so that the
 * sanitizers see what the kernel does as well.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>

#include "harness.h"
#include "tests.h"
#include "tree.h"

enum { NR_DEVICES = 4 };

static int open_device(void)
{
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		err(2, "/dev/fuse");
	return fd;
}

/* Of a device that is mounted. */
static int clone_device(int device)
{
	uint32_t source = (uint32_t)device;
	int fd = open_device();

	if (ioctl(fd, CFS_DEV_IOC_CLONE, &source))
		err(2, "clone");
	return fd;
}

static void mount_device(int fd, const char *mountpoint)
{
	char options[128];

	snprintf(options, sizeof(options),
		 "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions", fd);
	if (mount("composefs", mountpoint, "fuse.composefs", MS_RDONLY, options))
		err(2, "mount");
}

/* Wait for events until one of these has come. */
static uint32_t wait_for_events(struct cfs_worker *worker, int event_fd, uint32_t wanted)
{
	struct pollfd fds = { .fd = event_fd, .events = POLLIN };
	uint32_t events = 0;
	eventfd_t ignored;

	while (!(events & wanted)) {
		if (poll(&fds, 1, -1) < 0 && errno != EINTR)
			err(2, "poll");
		eventfd_read(event_fd, &ignored);
		events |= cfs_worker_events(worker);
	}
	return events;
}

int serve_mount(const char *objects, const char *mountpoint, bool with_passthrough)
{
	int fds[NR_DEVICES], event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int objects_fd = tree_make_objects(objects);
	char why[256] = "";
	struct cfs_worker *worker;
	struct cfs_config config = {
		.table_fd = tree_publish(true),
		.state_fd = memfd_create("state", MFD_CLOEXEC),
		.relay_fd = -1,
		.event_fd = event_fd,
		.nr_devices = NR_DEVICES,
		.nr_object_dirs = 1,
		.device_fds = fds,
		.object_dirs = &objects_fd,
		.passthrough = with_passthrough ? CFS_PASSTHROUGH_ON : CFS_PASSTHROUGH_OFF,
		.stack_depth = 2,
		.max_poll_us = UINT32_MAX,
	};

	fds[0] = open_device();
	mount_device(fds[0], mountpoint);
	for (unsigned int index = 1; index < NR_DEVICES; index++)
		fds[index] = clone_device(fds[0]);
	worker = cfs_worker_create(&config, why, sizeof(why));
	if (!worker)
		errx(2, "cfs_worker_create: %s", why);
	CHECK(cfs_worker_start(worker) == 0);
	CHECK(wait_for_events(worker, event_fd, CFS_EVENT_SERVING | CFS_EVENT_FAILED) &
	      CFS_EVENT_SERVING);
	puts("serving");
	fflush(stdout);
	wait_for_events(worker, event_fd, CFS_EVENT_ENDED);
	cfs_worker_stop(worker);
	cfs_worker_destroy(worker);
	return 0;
}
