/*
 * What the files that answer requests from the table share.  ops.c: the list of operations, and
 * those on single inodes.  init.c: INIT.  readdir.c: listings; names_only.c: what form they take.
 * xattrs.c: extended attributes.
 *
 * Answers equal those of cfs/fuse/operations.py, which also says why they are so.
 */
#ifndef CFS_OPS_H
#define CFS_OPS_H

#include "internal.h"

/* A time that never comes, as libfuse writes an infinite timeout. */
#define CFS_FOREVER UINT64_MAX
#define CFS_FOREVER_NSEC 999999999u

/* Argument of a request; cfs_dispatch() has checked that it is there. */
#define CFS_ARGUMENT(thread, type) ((const type *)(const void *)cfs_argument(thread))

/* ---- ops.c ---- */

void cfs_fill_entry(const struct cfs_table *table, uint32_t ino, struct fuse_entry_out *entry);

/* ---- init.c ---- */

void cfs_answer_init(struct cfs_thread *thread, uint32_t ino);

/* ---- readdir.c ---- */

void cfs_answer_readdir(struct cfs_thread *thread, uint32_t ino);
void cfs_answer_readdirplus(struct cfs_thread *thread, uint32_t ino);

/* ---- names_only.c ---- */

/* Whether the listing of a directory from off on leaves out what is known of its files. */
bool cfs_is_names_only(struct cfs_thread *thread, uint32_t directory, uint64_t off);

/* Before the reply: this listing leaves out what is known of a file. */
void cfs_note_names_only(struct cfs_thread *thread, uint32_t directory);

/* After the reply to a LOOKUP: somebody looks at a file of this directory. */
void cfs_note_look(struct cfs_thread *thread, uint32_t directory);

/* ---- xattrs.c ---- */

void cfs_answer_getxattr(struct cfs_thread *thread, uint32_t ino);
void cfs_answer_listxattr(struct cfs_thread *thread, uint32_t ino);

#endif
