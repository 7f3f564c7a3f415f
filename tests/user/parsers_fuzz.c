// SPDX-License-Identifier: GPL-2.0-only
/*
 * libFuzzer on the parsers of tools/: parse.c, and the command line in cowctl.c.
 *
 * The first letter of an input chooses the parser, see targets[]; in what several
 * words or lines are given to, a tab ends each but the last.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../tools/cowctl.h"
#include "../../tools/image.h"

#define MAX_WORDS	16

static const char *input;

/* The sanitizers do not see when one member runs over into the next. */
#define CHECK_ENDS(array) CHECK(memchr(array, '\0', sizeof(array)))
#define CHECK(condition) do { if (!(condition)) complain(#condition, __LINE__); } while (0)

static void complain(const char *condition, int line)
{
	fprintf(stderr, "line %d: not so: %s\ninput: %s\n", line, condition, input);
	abort();
}

/* A copy of its own size, so that a sanitizer sees an access past its end. */
static char *copy_of(const char *text)
{
	char *copy = strdup(text);

	if (!copy)
		abort();
	return copy;
}

static bool one_of(int err, int a, int b)
{
	return err == a || err == b;
}

/* Ends each word at its tab. Return: how many there are; the last ends with the text. */
static int split(char *text, char *words[MAX_WORDS])
{
	int n = 0;

	words[n++] = text;
	for (; *text && n < MAX_WORDS; text++)
		if (*text == '\t') {
			*text = '\0';
			words[n++] = text + 1;
		}
	return n;
}

static void try_size(char *text)
{
	uint64_t bytes = 0, again = 0;
	char number[24];
	int err = parse_size(text, &bytes);

	if (err) {
		CHECK(one_of(err, -EINVAL, -ERANGE));
		return;
	}
	CHECK(text[0] >= '0' && text[0] <= '9');
	sprintf(number, "%" PRIu64, bytes);
	CHECK(!parse_size(number, &again) && again == bytes);
}

static void try_limit(char *text)
{
	static const uint64_t ram[] = { 0, 1, 4096, 8ULL << 30, UINT64_MAX };

	for (size_t i = 0; i < sizeof(ram) / sizeof(ram[0]); i++) {
		uint64_t blocks = 0;
		int err = parse_limit(text, ram[i], &blocks);

		if (err)
			CHECK(one_of(err, -EINVAL, -ERANGE));
		else
			CHECK(blocks && (blocks == NO_LIMIT) == !strcmp(text, "none"));
		if (!err && strchr(text, '%'))
			CHECK(blocks <= ram[i] / BLOCK_BYTES);
	}
}

static void try_range(char *text)
{
	uint64_t start = 0, end = 0;
	int err = parse_range(text, &start, &end);

	CHECK(err ? one_of(err, -EINVAL, -ERANGE) : start < end);
}

static void try_seconds(char *text)
{
	uint64_t ms = 0;
	int err = parse_seconds(text, &ms);

	CHECK(err ? one_of(err, -EINVAL, -ERANGE) : ms / 1000 == strtoull(text, NULL, 10));
}

static void try_threshold(char *text)
{
	unsigned int percent = 0;
	uint64_t bytes = 0;
	int err = parse_threshold(text, &percent, &bytes);

	if (err)
		CHECK(one_of(err, -EINVAL, -ERANGE));
	else
		CHECK(percent <= 100 && !percent == !!bytes);
}

static void try_port(char *text)
{
	int port = parse_port(text);

	if (port < 0)
		CHECK(port == -EINVAL);
	else
		CHECK(port >= 1 && port <= 65535 && atoi(text) == port);
}

/* What libdevmapper makes of it: each byte that is not plain as \xNN. */
static void check_mangled(const char *name, const char *mangled)
{
	for (; *name; name++) {
		unsigned int c;

		if (*mangled == '\\') {
			CHECK(sscanf(mangled, "\\x%2x", &c) == 1 && c == (unsigned char)*name);
			mangled += 4;
		} else {
			CHECK(*mangled++ == *name);
		}
	}
	CHECK(!*mangled);
}

static void try_name(char *text)
{
	static const char *const words[] = { "base", "limit", "size", NULL };
	const char *error = name_error(text), *guess = nearest(text, words);
	char *mangled = malloc(NAME_BYTES);

	if (!mangled)
		abort();
	CHECK(!guess || guess == words[0] || guess == words[1] || guess == words[2]);
	if (!error)
		CHECK(*text && strlen(text) < NAME_BYTES && printable(text) && !strchr(text, '/'));
	if (!mangle_name(text, mangled)) {
		CHECK(strlen(mangled) < NAME_BYTES);
		check_mangled(text, mangled);
	}
	free(mangled);
}

static void try_quoting(char *text)
{
	size_t size = 3 * strlen(text) + 1;
	char *quoted = malloc(size), *line = malloc(size + 32), *again = copy_of(text);
	struct cow_table table;

	if (!quoted || !line)
		abort();
	CHECK(!percent_encode(text, quoted, size));
	CHECK(printable(quoted) && !strchr(quoted, ' '));
	sprintf(line, "1:2 2 tmpfs %s", quoted);
	if (*text && strlen(text) < PATH_MAX)
		CHECK(!parse_table(line, &table) && !strcmp(table.tmpfs, text));
	unescape_octal(again);
	CHECK(strlen(again) <= strlen(text));
	free(again);
	free(line);
	free(quoted);
}

static void try_uri(char *text)
{
	struct nbd_uri uri;
	int err = parse_nbd_uri(text, &uri);

	if (err) {
		CHECK(one_of(err, -EINVAL, -ENAMETOOLONG) || one_of(err, -EPROTONOSUPPORT, -ENOTSUP));
		return;
	}
	CHECK_ENDS(uri.host);
	CHECK_ENDS(uri.port);
	CHECK_ENDS(uri.socket);
	CHECK_ENDS(uri.export);
	/* What becomes an argument of nbd-client is none of its options. */
	CHECK(*uri.host != '-' && !strchr(uri.host, '='));
	CHECK(*uri.socket != '-' && !strchr(uri.socket, '='));
	CHECK(!*uri.host == !!*uri.socket && !*uri.host == !*uri.port);
	CHECK(!*uri.port || parse_port(uri.port) > 0);
}

static void try_table(char *text)
{
	struct cow_table table, again;
	char line[4 * PATH_MAX], same[4 * PATH_MAX];

	if (parse_table(text, &table))
		return;
	CHECK(!format_table(&table, line, sizeof(line)));
	CHECK(!parse_table(line, &again) && !format_table(&again, same, sizeof(same)));
	CHECK(!strcmp(line, same) && !strcmp(table.tmpfs, again.tmpfs));
	CHECK_ENDS(table.tmpfs);
	CHECK(table.limit_blocks == NO_LIMIT || strstr(text, "limit"));
}

static void try_status(char *text)
{
	struct cow_status status;

	if (!parse_status(text, &status))
		CHECK(*status.health && strchr(text, '/'));
}

static void try_mount(char *text)
{
	unsigned int major, minor;
	char *where = parse_mount(text, &major, &minor);

	CHECK(!where || *where);
	free(where);
}

static void try_records(char *text)
{
	struct nbd_link link;
	struct export export;
	long pid = parse_nbd_record(text, &link);

	if (pid < 0)
		CHECK(pid == -EINVAL);
	else
		CHECK(pid && !strncmp(link.dev, "/dev/nbd", 8) && !strchr(link.dev + 5, '/'));
	if (!parse_export_record(text, &export))
		CHECK(*export.server);
}

static void try_programs(char *text)
{
	size_t size = strlen(text);
	char line[64] = "", *copy = copy_of(text), *words[MAX_WORDS], *error;
	int n;

	error = table_error(copy);
	CHECK(!error || !strchr(error, '\n'));
	strcpy(copy, text);
	last_line(copy, line, sizeof(line));
	CHECK(!strpbrk(line, "\r\n"));
	free(copy);
	n = split(text, words);
	if (is_server(text, size, "/run/cowctl/a.pid"))
		CHECK(n > 1 && strstr(words[0], "nbd"));
}

static void try_extents(char *text)
{
	const char *answer = text, *before = text;
	uint64_t blocks;
	char kind;

	while (next_extent(&answer, &blocks, &kind) > 0) {
		CHECK(answer > before && strchr("bhoz", kind));
		before = answer;
	}
}

static void try_json(char *text)
{
	struct image_info info;

	if (parse_image_info(text, &info))
		CHECK(!info.bytes && !info.backing);
	CHECK(info.bytes <= INT64_MAX && info.end <= INT64_MAX);
	image_info_free(&info);
}

/*
 * The command line, up to where it is understood
 */

static unsigned int sentences;
static bool was_run;

int cowctl_main(int argc, char **argv);
int __wrap_fail(int err, const char *fmt, ...);

/* Each sentence is made, and counted. */
int __wrap_fail(int err, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	CHECK(*text);
	sentences++;
	return err;
}

uid_t geteuid(void)
{
	return 0;
}

void dm_init(void)
{
}

static int command(const struct args *args)
{
	char mangled[NAME_BYTES];

	was_run = true;
	CHECK(!name_error(args->name));
	CHECK(!mangle_name(args->name, mangled) && !strcmp(mangled, args->mangled));
	for (int i = 0; i < KEY_COUNT; i++)
		CHECK(!args->value[i] || *args->value[i]);
	for (char **word = args->command; word && *word; word++)
		CHECK(strlen(*word) <= strlen(input));
	return 0;
}

int cmd_create(const struct args *args) { return command(args); }
int cmd_remove(const struct args *args) { return command(args); }
int cmd_list(const struct args *args) { return command(args); }
int cmd_status(const struct args *args) { return command(args); }
int cmd_top(const struct args *args) { return command(args); }
int cmd_wait(const struct args *args) { return command(args); }
int cmd_reset(const struct args *args) { return command(args); }
int cmd_set(const struct args *args) { return command(args); }
int cmd_prefetch(const struct args *args) { return command(args); }
int cmd_changes(const struct args *args) { return command(args); }
int cmd_map(const struct args *args) { return command(args); }
int cmd_diff(const struct args *args) { return command(args); }
int cmd_load(const struct args *args) { return command(args); }
int cmd_commit(const struct args *args) { return command(args); }
int cmd_rebase(const struct args *args) { return command(args); }
int cmd_serve(const struct args *args) { return command(args); }
int cmd_export(const struct args *args) { return command(args); }
int cmd_unexport(const struct args *args) { return command(args); }

static void try_arguments(char *text)
{
	static char program[] = "cowctl";
	char *words[MAX_WORDS], *argv[MAX_WORDS + 2] = { program };
	int n = split(text, words), status;
	bool only_options = true;

	for (int i = 0; i < n; i++) {
		argv[i + 1] = words[i];
		only_options &= *words[i] == '-';
	}
	setenv("PATH", "/bin", 1);
	optind = 0;
	sentences = 0;
	was_run = false;
	status = cowctl_main(n + 1, argv);
	CHECK(one_of(status, 0, EXIT_USAGE));
	CHECK(status ? !was_run : !sentences);
	/* without a command there is the help */
	CHECK(!status || sentences == 1 || (!sentences && only_options));
}

static const struct {
	char letter;
	void (*call)(char *text);
} targets[] = {
	{ 'a', try_arguments },
	{ 'c', try_seconds },
	{ 'e', try_extents },
	{ 'g', try_range },
	{ 'h', try_threshold },
	{ 'j', try_json },
	{ 'l', try_limit },
	{ 'm', try_mount },
	{ 'n', try_name },
	{ 'o', try_programs },
	{ 'p', try_port },
	{ 'q', try_quoting },
	{ 'r', try_records },
	{ 's', try_size },
	{ 't', try_table },
	{ 'u', try_uri },
	{ 'v', try_status },
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text;

	if (!size)
		return 0;
	text = malloc(size);
	if (!text)
		abort();
	memcpy(text, data + 1, size - 1);
	text[size - 1] = '\0';
	for (size_t i = 0; i < sizeof(targets) / sizeof(targets[0]); i++)
		if (targets[i].letter == data[0]) {
			char *copy = copy_of(text);

			input = text;
			targets[i].call(copy);
			free(copy);
		}
	free(text);
	return 0;
}
