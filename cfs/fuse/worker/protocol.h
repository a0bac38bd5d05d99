/*
 * What <linux/fuse.h> of Debian 12 (protocol 7.38) lacks of 7.45.
 * Source: Linux 6.18, include/uapi/linux/fuse.h; spec fuse-data-plane 2.
 */
#ifndef CFS_PROTOCOL_H
#define CFS_PROTOCOL_H

#include <linux/fuse.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define CFS_FUSE_MINOR 45u /* the newest that we speak */

#define CFS_INIT_PASSTHROUGH (1ull << 37)
#define CFS_INIT_NO_EXPORT (1ull << 38)
#define CFS_INIT_HAS_RESEND (1ull << 39)

#define CFS_STATX 52 /* opcode */
#define CFS_FOPEN_PASSTHROUGH (1u << 7)
#define CFS_UNIQUE_RESEND (1ull << 63)
#define CFS_NOTIFY_RESEND 7

#define CFS_DEV_IOC_CLONE _IOR(229, 0, uint32_t)
#define CFS_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct cfs_backing_map)
#define CFS_DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

struct cfs_backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

/* fuse_init_out of 7.45; the same 64 bytes. */
struct cfs_init_out {
	uint32_t major;
	uint32_t minor;
	uint32_t max_readahead;
	uint32_t flags;
	uint16_t max_background;
	uint16_t congestion_threshold;
	uint32_t max_write;
	uint32_t time_gran;
	uint16_t max_pages;
	uint16_t map_alignment;
	uint32_t flags2;
	uint32_t max_stack_depth;
	uint16_t request_timeout;
	uint16_t unused[11];
};

/* fuse_open_out with the backing id of 7.40. */
struct cfs_open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

_Static_assert(sizeof(struct fuse_in_header) == 40, "fuse_in_header");
_Static_assert(sizeof(struct fuse_out_header) == 16, "fuse_out_header");
_Static_assert(sizeof(struct fuse_attr) == 88, "fuse_attr");
_Static_assert(sizeof(struct fuse_entry_out) == 128, "fuse_entry_out");
_Static_assert(sizeof(struct fuse_attr_out) == 104, "fuse_attr_out");
_Static_assert(sizeof(struct cfs_init_out) == 64, "fuse_init_out");
_Static_assert(sizeof(struct cfs_open_out) == 16, "fuse_open_out");
_Static_assert(sizeof(struct cfs_backing_map) == 16, "fuse_backing_map");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tables are little endian");

#endif
