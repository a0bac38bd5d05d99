"""cffi builder of ``cfs.fsverity._libfsverity``, the border to Debian's libfsverity.

setuptools runs it through ``cffi_modules`` in setup.py.  API mode: cffi releases the
interpreter lock around every call.  What libfsverity reads is read in C as well, so the lock
stays released for a whole digest.
"""

from cffi import FFI  # type: ignore[import-untyped] # cffi ships no types

DECLARATIONS = """
size_t cfs_digest_files(const int *fds, const uint64_t *sizes, size_t nr_files,
                        uint32_t algorithm, uint8_t *digests, size_t digest_size, int *result);
size_t cfs_read_files(const int *fds, const uint64_t *sizes, size_t nr_files,
                      uint32_t algorithm, uint8_t *contents, uint8_t *digests,
                      size_t digest_size, int *result);
int cfs_digest_buffer(const void *data, uint64_t size, uint32_t algorithm,
                      uint8_t *digest, size_t digest_size);
int cfs_enable(int fd, uint32_t algorithm);
"""

SOURCE = r"""
#include <errno.h>
#include <libfsverity.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* libfsverity asks for one block at a time; reading more at once saves system calls. */
struct file_reader {
	int fd;
	off_t off;
	size_t start;
	size_t end;
	uint8_t buffer[65536];
};

struct buffer_reader {
	const uint8_t *data;
};

/* Fills the buffer: 0, -errno, or 1 at the end of the file. */
static int fill(struct file_reader *reader)
{
	ssize_t nr_read;

	do {
		nr_read = pread(reader->fd, reader->buffer, sizeof(reader->buffer), reader->off);
	} while (nr_read < 0 && errno == EINTR);
	if (nr_read < 0)
		return -errno;
	reader->off += nr_read;
	reader->start = 0;
	reader->end = (size_t)nr_read;
	return nr_read == 0;
}

static int read_file(void *context, void *out, size_t count)
{
	struct file_reader *reader = context;
	uint8_t *next = out;

	while (count > 0) {
		size_t size = reader->end - reader->start;

		if (size == 0) {
			int ret = fill(reader);

			if (ret)
				return ret;
			continue;
		}
		if (size > count)
			size = count;
		memcpy(next, reader->buffer + reader->start, size);
		reader->start += size;
		next += size;
		count -= size;
	}
	return 0;
}

static int read_buffer(void *context, void *out, size_t count)
{
	struct buffer_reader *reader = context;

	memcpy(out, reader->data, count);
	reader->data += count;
	return 0;
}

static int compute(void *context, libfsverity_read_fn_t read_fn, uint64_t size,
		   uint32_t algorithm, uint8_t *digest, size_t digest_size)
{
	struct libfsverity_merkle_tree_params params = {
		.version = 1,
		.hash_algorithm = algorithm,
		.file_size = size,
		.block_size = 4096,
	};
	struct libfsverity_digest *result = NULL;
	int ret;

	ret = libfsverity_compute_digest(context, read_fn, &params, &result);
	if (ret)
		return ret;
	if (result->digest_size == digest_size)
		memcpy(digest, result->digest, digest_size);
	else
		ret = -EINVAL;
	free(result);
	return ret;
}

/* 0, -errno, or 1 if the file does not hold exactly size bytes. */
static int digest_file(int fd, uint64_t size, uint32_t algorithm, uint8_t *digest,
		       size_t digest_size)
{
	struct file_reader reader;
	int ret;

	reader.fd = fd;
	reader.off = 0;
	reader.start = 0;
	reader.end = 0;
	ret = compute(&reader, read_file, size, algorithm, digest, digest_size);
	if (ret)
		return ret;
	if (reader.start != reader.end)
		return 1;
	ret = fill(&reader);
	return ret < 0 ? ret : !ret;
}

/* Number of files digested; if it is not all of them, *result says why the next one was not. */
size_t cfs_digest_files(const int *fds, const uint64_t *sizes, size_t nr_files,
			uint32_t algorithm, uint8_t *digests, size_t digest_size, int *result)
{
	size_t i;

	*result = 0;
	for (i = 0; i < nr_files && !*result; i++)
		*result = digest_file(fds[i], sizes[i], algorithm, digests + i * digest_size,
				      digest_size);
	return *result ? i - 1 : i;
}

/* 0, -errno, or 1 if the file does not hold exactly size bytes. */
static int read_exactly(int fd, uint64_t size, uint8_t *contents)
{
	uint8_t more;
	uint64_t off = 0;

	for (;;) {
		void *next = off < size ? contents + off : &more;
		ssize_t nr_read = pread(fd, next, off < size ? size - off : 1, (off_t)off);

		if (nr_read < 0 && errno == EINTR)
			continue;
		if (nr_read < 0)
			return -errno;
		if (nr_read == 0 || off == size)
			return nr_read != 0 || off != size;
		off += (uint64_t)nr_read;
	}
}

/* As cfs_digest_files; the files lie one after the other in contents. */
size_t cfs_read_files(const int *fds, const uint64_t *sizes, size_t nr_files,
		      uint32_t algorithm, uint8_t *contents, uint8_t *digests,
		      size_t digest_size, int *result)
{
	size_t i;

	*result = 0;
	for (i = 0; i < nr_files && !*result; i++) {
		struct buffer_reader reader = { .data = contents };

		*result = read_exactly(fds[i], sizes[i], contents);
		if (!*result)
			*result = compute(&reader, read_buffer, sizes[i], algorithm,
					  digests + i * digest_size, digest_size);
		contents += sizes[i];
	}
	return *result ? i - 1 : i;
}

int cfs_digest_buffer(const void *data, uint64_t size, uint32_t algorithm, uint8_t *digest,
		      size_t digest_size)
{
	struct buffer_reader reader = { .data = data };

	return compute(&reader, read_buffer, size, algorithm, digest, digest_size);
}

int cfs_enable(int fd, uint32_t algorithm)
{
	struct libfsverity_merkle_tree_params params = {
		.version = 1,
		.hash_algorithm = algorithm,
		.block_size = 4096,
	};

	return libfsverity_enable(fd, &params);
}
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source("cfs.fsverity._libfsverity", SOURCE, libraries=["fsverity"])
