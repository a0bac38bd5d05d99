/*
 * test_worker OBJECTS [NAME]: run all tests, or one.  OBJECTS is an existing directory.
 * test_worker OBJECTS serve MOUNTPOINT [passthrough]: serve the tree.
 */
#include <err.h>
#include <stdio.h>
#include <string.h>

#include "tests.h"

int main(int argc, char **argv)
{
	static const struct test *const groups[] = { metadata_tests, data_tests, malformed_tests,
						     life_tests };
	unsigned int nr_run = 0;

	if (argc > 3 && strcmp(argv[2], "serve") == 0)
		return serve_mount(argv[1], argv[3], argc > 4);
	if (argc < 2 || argc > 3)
		errx(2, "usage: test_worker OBJECTS [NAME]");
	for (unsigned int group = 0; group < sizeof(groups) / sizeof(*groups); group++) {
		for (const struct test *test = groups[group]; test->name; test++) {
			if (argc == 3 && strcmp(argv[2], test->name) != 0)
				continue;
			fprintf(stderr, "%s\n", test->name);
			test->run(argv[1]);
			nr_run++;
		}
	}
	if (!nr_run)
		errx(2, "no test %s", argv[2]);
	printf("%u tests passed\n", nr_run);
	return 0;
}
