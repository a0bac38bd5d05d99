/*
 * Listings: READDIR and READDIRPLUS.
 *
 * Entry 0 of a directory is ".", entry 1 is "..", the others follow in the order of the table; an
 * offset is the number of the entry to go on with.  Each directory costs two requests: the second,
 * for what comes behind the last entry, is answered with nothing.
 */
#include "ops.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

enum { NR_DOTS = 2 };

/* How much READDIRPLUS tells of an entry; a file of which it tells nothing is not instantiated. */
enum form { NAME, NAME_AND_NOTHING, NAME_AND_ATTRIBUTES };

struct listing {
	const struct cfs_table *table;
	uint32_t directory;
	bool has_attributes; /* READDIRPLUS */
	bool is_names_only;
	bool leaves_out; /* so far: an entry in names-only form */
	uint8_t *data;
	size_t room;
	size_t size; /* so far */
};

/* Append an entry, if there is room. */
static bool add(struct listing *listing, enum form form, uint32_t ino, uint64_t index,
		const uint8_t *name, uint32_t name_size)
{
	const struct fuse_dirent dirent = { .ino = ino, .off = index + 1, .namelen = name_size,
					    .type = listing->table->mode[ino] >> 12 };
	uint8_t *data = listing->data + listing->size;
	size_t head_size = form == NAME ? 0 : sizeof(struct fuse_entry_out);
	size_t name_end = head_size + FUSE_NAME_OFFSET + name_size;
	size_t size = FUSE_DIRENT_ALIGN(name_end);

	if (size > listing->room - listing->size)
		return false;
	if (form == NAME_AND_ATTRIBUTES)
		cfs_fill_entry(listing->table, ino, (void *)data);
	else
		memset(data, 0, head_size);
	memcpy(data + head_size, &dirent, FUSE_NAME_OFFSET);
	memcpy(data + head_size + FUSE_NAME_OFFSET, name, name_size);
	memset(data + name_end, 0, size - name_end);
	listing->size += size;
	return true;
}

static bool add_dots(struct listing *listing, uint64_t index)
{
	uint32_t ino = index ? listing->table->parent[listing->directory] : listing->directory;

	/* the kernel takes no attributes from these */
	return add(listing, listing->has_attributes ? NAME_AND_NOTHING : NAME, ino, index,
		   (const uint8_t *)"..", (uint32_t)index + 1);
}

static bool add_dirent(struct listing *listing, uint64_t index)
{
	const struct cfs_table *table = listing->table;
	uint64_t dirent = table->dirent_start[listing->directory] + index - NR_DOTS;
	uint32_t ino = table->dirent_ino[dirent];
	bool leave_out = listing->is_names_only && !S_ISDIR(table->mode[ino]);
	enum form form = NAME;

	if (listing->has_attributes)
		form = leave_out ? NAME_AND_NOTHING : NAME_AND_ATTRIBUTES;
	if (!add(listing, form, ino, index, cfs_table_bytes(table, table->dirent_name_off[dirent]),
		 table->dirent_name_size[dirent]))
		return false;
	listing->leaves_out |= leave_out;
	return true;
}

static uint64_t nr_entries(const struct cfs_table *table, uint32_t directory)
{
	return NR_DOTS + table->dirent_start[directory + 1ull] - table->dirent_start[directory];
}

/* Fill the listing from an entry on. */
static void list(struct listing *listing, uint64_t index)
{
	uint64_t end = nr_entries(listing->table, listing->directory);
	bool has_room = true;

	for (; has_room && index < end; index++)
		has_room = index < NR_DOTS ? add_dots(listing, index) : add_dirent(listing, index);
}

void cfs_answer_readdir(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_read_in *in = CFS_ARGUMENT(thread, struct fuse_read_in);
	struct listing listing = { .table = &thread->worker->table, .directory = ino,
				   .data = thread->data,
				   .room = in->size < CFS_DATA_SIZE ? in->size : CFS_DATA_SIZE };

	if (!S_ISDIR(listing.table->mode[ino])) {
		cfs_reply_error(thread, ENOTDIR);
		return;
	}
	list(&listing, in->offset);
	cfs_reply(thread, listing.data, listing.size);
}

void cfs_answer_readdirplus(struct cfs_thread *thread, uint32_t ino)
{
	const struct fuse_read_in *in = CFS_ARGUMENT(thread, struct fuse_read_in);
	struct listing listing = { .table = &thread->worker->table, .directory = ino,
				   .has_attributes = true, .data = thread->data,
				   .room = in->size < CFS_DATA_SIZE ? in->size : CFS_DATA_SIZE };

	if (!S_ISDIR(listing.table->mode[ino])) {
		cfs_reply_error(thread, ENOTDIR);
		return;
	}
	listing.is_names_only = cfs_is_names_only(thread, ino, in->offset);
	/* at the end every file that was listed with attributes is known to the kernel */
	if (in->offset >= nr_entries(listing.table, ino) && !listing.is_names_only)
		cfs_push_directory(thread, ino);
	list(&listing, in->offset);
	if (listing.leaves_out)
		cfs_note_names_only(thread, ino);
	cfs_reply(thread, listing.data, listing.size);
}
