/*
 * Tests of the worker, one function each; a failure aborts.
 */
#ifndef CFS_TEST_TESTS_H
#define CFS_TEST_TESTS_H

#include <stdbool.h>

struct test {
	const char *name;
	void (*run)(const char *objects); /* a directory for the objects of the tree */
};

/* Each ends with an entry without a name. */
extern const struct test metadata_tests[];
extern const struct test data_tests[];
extern const struct test malformed_tests[];
extern const struct test life_tests[];

/* Mount the tree, say "serving", and serve until it is unmounted; status of the program. */
int serve_mount(const char *objects, const char *mountpoint, bool with_passthrough);

#endif
