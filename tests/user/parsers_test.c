// SPDX-License-Identifier: GPL-2.0-only
/* The parsers of tools/parse.c, with what people type and what they should not. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../tools/cowctl.h"

static unsigned int tests, failures, wrong;

/* Complains about the line that calls it. */
#define EXPECT(condition, what) expect(condition, what, #condition, __LINE__)

static void expect(bool good, const char *what, const char *condition, int line)
{
	if (!good) {
		printf("# line %d: %s: not so: %s\n", line, what, condition);
		wrong++;
	}
}

static void result(const char *title)
{
	tests++;
	failures += wrong != 0;
	printf("%sok %u %s\n", wrong ? "not " : "", tests, title);
	wrong = 0;
}

/* A copy of its own size, so that a sanitizer sees a read past its end. */
static char *exact(const char *text)
{
	char *copy = strdup(text);

	if (!copy)
		abort();
	return copy;
}

static void test_names(void)
{
	static const char *const good[] = {
		"cow", "a", "my disk", "Kopie\xc3\xa4", "\xe7\x89\x9b", "\xf0\x9f\x90\x84",
		"x.y", "...", "-", "100%",
	};
	static const char *const bad[] = {
		"", "a/b", "/", "a\\b", "a\\x20b", ".", "..", "control", "a\nb", "a\tb", "\x7f", "\xff",
		"\xc3",
		"\xc3(", "\xe7\x89", "\xc0\xaf", "\xf8\x88\x80\x80\x80", "\xc2\x9b",
	};
	char name[200], mangled[NAME_BYTES];

	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		char *copy = exact(good[i]);

		EXPECT(!name_error(copy), good[i]);
		free(copy);
	}
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *copy = exact(bad[i]);

		EXPECT(name_error(copy), bad[i]);
		free(copy);
	}
	memset(name, 'x', sizeof(name));
	name[127] = '\0';
	EXPECT(!name_error(name), "127 bytes");
	EXPECT(!mangle_name(name, mangled) && !strcmp(name, mangled), "127 bytes");
	name[126] = ' ';
	EXPECT(mangle_name(name, mangled) == -ENAMETOOLONG, "126 bytes and a blank");
	name[126] = 'x';
	name[127] = 'x';
	name[128] = '\0';
	EXPECT(name_error(name), "128 bytes");
	EXPECT(mangle_name(name, mangled) == -ENAMETOOLONG, "128 bytes");
	EXPECT(!mangle_name("a b\\\xc3\xa4#+-.:=@_", mangled), "mangling");
	EXPECT(!strcmp(mangled, "a\\x20b\\x5c\\xc3\\xa4#+-.:=@_"), mangled);
	result("names");
}

static void test_sizes(void)
{
	static const struct {
		const char *text;
		int err;
		uint64_t bytes;
	} cases[] = {
		{ "0", 0, 0 },
		{ "1", 0, 1 },
		{ "130000", 0, 130000 },
		{ "4k", 0, 4096 },
		{ "4K", 0, 4096 },
		{ "4KiB", 0, 4096 },
		{ "4kib", 0, 4096 },
		{ "512M", 0, 512ULL << 20 },
		{ "4G", 0, 4ULL << 30 },
		{ "16T", 0, 16ULL << 40 },
		{ "1P", 0, 1ULL << 50 },
		{ "15E", 0, 15ULL << 60 },
		{ "18446744073709551615", 0, UINT64_MAX },
		{ "18446744073709551616", -ERANGE, 0 },
		{ "99999999999999999999999", -ERANGE, 0 },
		{ "16E", -ERANGE, 0 },
		{ "20000000T", -ERANGE, 0 },
		{ "", -EINVAL, 0 },
		{ "G", -EINVAL, 0 },
		{ "-1", -EINVAL, 0 },
		{ "+1", -EINVAL, 0 },
		{ " 1", -EINVAL, 0 },
		{ "1 ", -EINVAL, 0 },
		{ "1 G", -EINVAL, 0 },
		{ "1.5G", -EINVAL, 0 },
		{ "0x10", -EINVAL, 0 },
		{ "4GB", -EINVAL, 0 },
		{ "4GiBs", -EINVAL, 0 },
		{ "4Gi", -EINVAL, 0 },
		{ "4B", -EINVAL, 0 },
		{ "25%", -EINVAL, 0 },
		{ "4\xc2\xa0G", -EINVAL, 0 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		char *copy = exact(cases[i].text);
		uint64_t bytes = 0;
		int err = parse_size(copy, &bytes);

		EXPECT(err == cases[i].err, copy);
		EXPECT(err || bytes == cases[i].bytes, copy);
		free(copy);
	}
	result("sizes");
}

static void test_limits(void)
{
	static const struct {
		const char *text;
		int err;
		uint64_t blocks;
	} cases[] = {
		{ "none", 0, NO_LIMIT },
		{ "4G", 0, 1 << 20 },
		{ "4096", 0, 1 },
		{ "8191", 0, 1 },
		{ "4095", -ERANGE, 0 },
		{ "0", -ERANGE, 0 },
		{ "25%", 0, 1 << 18 },
		{ "100%", 0, 1 << 20 },
		{ "1%", 0, 10485 },
		{ "0%", -ERANGE, 0 },
		{ "101%", -ERANGE, 0 },
		{ "18446744073709551615%", -ERANGE, 0 },
		{ "18446744073709551616%", -ERANGE, 0 },
		{ "None", -EINVAL, 0 },
		{ "none ", -EINVAL, 0 },
		{ "%", -EINVAL, 0 },
		{ "25%%", -EINVAL, 0 },
		{ "-25%", -EINVAL, 0 },
		{ "2.5%", -EINVAL, 0 },
		{ "", -EINVAL, 0 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		char *copy = exact(cases[i].text);
		uint64_t blocks = 0;
		int err = parse_limit(copy, 4ULL << 30, &blocks);

		EXPECT(err == cases[i].err, copy);
		EXPECT(err || blocks == cases[i].blocks, copy);
		free(copy);
	}
	result("limits");
}

static void test_ports(void)
{
	EXPECT(parse_port("1") == 1, "1");
	EXPECT(parse_port("65535") == 65535, "65535");
	EXPECT(parse_port("0") == -EINVAL, "0");
	EXPECT(parse_port("65536") == -EINVAL, "65536");
	EXPECT(parse_port("") == -EINVAL, "");
	EXPECT(parse_port("-1") == -EINVAL, "-1");
	EXPECT(parse_port("80 ") == -EINVAL, "80 ");
	EXPECT(parse_port("nbd") == -EINVAL, "nbd");
	result("ports");
}

static void test_uris(void)
{
	static const struct {
		const char *text;
		const char *host, *port, *export, *socket;
	} good[] = {
		{ "nbd://h", "h", "10809", "", "" },
		{ "nbd://h/", "h", "10809", "", "" },
		{ "nbd://h/e", "h", "10809", "e", "" },
		{ "nbd://h:1/e/f", "h", "1", "e/f", "" },
		{ "nbd://h:65535//e", "h", "65535", "/e", "" },
		{ "nbd://[::1]", "::1", "10809", "", "" },
		{ "nbd://[fe80::1%25eth0]:10810/x", "fe80::1%eth0", "10810", "x", "" },
		{ "nbd://example.org/a%20b%2fc%C3%A4", "example.org", "10809", "a b/c\xc3\xa4", "" },
		{ "nbd+unix:///?socket=/tmp/s", "", "", "", "/tmp/s" },
		{ "nbd+unix:///e%3f?socket=/tmp/a%20b", "", "", "e?", "/tmp/a b" },
		{ "nbd+unix:///e/f?socket=s", "", "", "e/f", "s" },
	};
	static const struct {
		const char *text;
		int err;
	} bad[] = {
		{ "", -EPROTONOSUPPORT },
		{ "nbd:", -EPROTONOSUPPORT },
		{ "nbds://h/e", -EPROTONOSUPPORT },
		{ "nbd+vsock:///e", -EPROTONOSUPPORT },
		{ "http://h/e", -EPROTONOSUPPORT },
		{ "nbd://", -EINVAL },
		{ "nbd:///e", -EINVAL },
		{ "nbd://:10809/e", -EINVAL },
		{ "nbd://h:/e", -EINVAL },
		{ "nbd://h:0/e", -EINVAL },
		{ "nbd://h:65536/e", -EINVAL },
		{ "nbd://h:100000/e", -EINVAL },
		{ "nbd://h:x/e", -EINVAL },
		{ "nbd://h:1:2/e", -EINVAL },
		{ "nbd://::1/e", -EINVAL },
		{ "nbd://[::1/e", -EINVAL },
		{ "nbd://[]/e", -EINVAL },
		{ "nbd://[::1]x/e", -EINVAL },
		{ "nbd://-help/e", -ENOTSUP },
		{ "nbd://%2Dd%2Fdev%2Fnbd0", -ENOTSUP },
		{ "nbd://a%3Db/e", -ENOTSUP },
		{ "nbd+unix:///e?socket=-d", -ENOTSUP },
		{ "nbd+unix:///e?socket=/a%3Db", -ENOTSUP },
		{ "nbd://h/e?socket=s", -EINVAL },
		{ "nbd://h/%", -EINVAL },
		{ "nbd://h/%2", -EINVAL },
		{ "nbd://h/%zz", -EINVAL },
		{ "nbd://h/%00", -EINVAL },
		{ "nbd://h/a%00b", -EINVAL },
		{ "nbd+unix:///e", -EINVAL },
		{ "nbd+unix:///e?socket=", -EINVAL },
		{ "nbd+unix:///e?sock=s", -EINVAL },
		{ "nbd+unix://h/e?socket=s", -EINVAL },
		{ "nbd+unix:///e?socket=s&x=y", -EINVAL },
		{ "nbd+unix:///e?socket=%00", -EINVAL },
	};
	struct nbd_uri uri;
	char text[5000];

	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		char *copy = exact(good[i].text);

		EXPECT(!parse_nbd_uri(copy, &uri), copy);
		EXPECT(!strcmp(uri.host, good[i].host), copy);
		EXPECT(!strcmp(uri.port, good[i].port), copy);
		EXPECT(!strcmp(uri.export, good[i].export), copy);
		EXPECT(!strcmp(uri.socket, good[i].socket), copy);
		free(copy);
	}
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *copy = exact(bad[i].text);

		EXPECT(parse_nbd_uri(copy, &uri) == bad[i].err, copy);
		free(copy);
	}
	sprintf(text, "nbd+unix:///?socket=/%0106d", 0);
	EXPECT(!parse_nbd_uri(text, &uri) && strlen(uri.socket) == 107, "107 bytes of a socket");
	sprintf(text, "nbd+unix:///?socket=/%0107d", 0);
	EXPECT(parse_nbd_uri(text, &uri) == -ENAMETOOLONG, "108 bytes of a socket");
	sprintf(text, "nbd://h/%04096d", 0);
	EXPECT(!parse_nbd_uri(text, &uri) && strlen(uri.export) == 4096, "the longest export");
	sprintf(text, "nbd://h/%04097d", 0);
	EXPECT(parse_nbd_uri(text, &uri) == -ENAMETOOLONG, "a longer one");
	sprintf(text, "nbd://%0256d/", 0);
	EXPECT(parse_nbd_uri(text, &uri) == -ENAMETOOLONG, "a long host");
	result("NBD addresses");
}

/* Whatever bytes a path has, they must come back out of the URI and the table. */
static void test_quoting(void)
{
	char every[256], quoted[1100], text[1200], line[1200];
	struct cow_table table;
	struct nbd_uri uri;
	size_t n = 0;

	/* '=' is what nbd-client cannot take; it comes first, where it is left out */
	every[n++] = '=';
	for (int c = 1; c < 256; c++)
		if (c != '=')
			every[n++] = c;
	every[n] = '\0';
	for (size_t start = 1; start < n; start += 100) {
		char part[102] = "/";

		strncat(part, every + start, 100);
		EXPECT(!percent_encode(part, quoted, sizeof(quoted)), "percent_encode");
		EXPECT(printable(quoted), "percent_encode");
		sprintf(text, "nbd+unix:///?socket=%s", quoted);
		EXPECT(!parse_nbd_uri(text, &uri) && !strcmp(uri.socket, part), quoted);
	}
	EXPECT(!percent_encode(every, quoted, sizeof(quoted)), "percent_encode");
	sprintf(line, "1:2 4 tmpfs %s limit 7", quoted);
	EXPECT(!parse_table(line, &table), "the table");
	EXPECT(!strcmp(table.tmpfs, every) && table.limit_blocks == 7, "the table");

	strcpy(text, "/a\\040b\\134c\\09\\1\\");
	unescape_octal(text);
	EXPECT(!strcmp(text, "/a b\\c\\09\\1\\"), text);

	for (size_t size = 1; size < 16; size++) {
		char *out = malloc(size);

		if (!out)
			abort();
		EXPECT(percent_encode("a b%c", out, size) == (size < 10 ? -ENAMETOOLONG : 0),
		       "percent_encode in little room");
		EXPECT(size < 10 || !strcmp(out, "a%20b%25c"), "percent_encode in little room");
		free(out);
	}
	result("quoting");
}

static void test_tables(void)
{
	static const char *const bad[] = {
		"", "43", "43:", "43:0x", "43:-1", "43:4294967296", ":0", "/dev/nbd0 0", "43:0 2 limit", "43:0 2 limit x",
		"43:0 2 limit -1", "43:0 1 tmpfs", "43:0 2 tmpfs %", "43:0 2 tmpfs /%0g",
		"43:0 2 tmpfs /%00", "43:0 2 cache_limit", "43:0 2 cache_limit x",
	};
	static const char all[] =
		"259:1048575 9 limit 1048576 tmpfs /a%20b cow_on_read cow_on_cache cache_limit 9 queue_errors";
	char line[sizeof(all)];
	struct cow_table table;

	EXPECT(!parse_table("43:0 0", &table), "no features");
	EXPECT(table.major == 43 && !table.minor, "no features");
	EXPECT(table.limit_blocks == NO_LIMIT && !table.tmpfs[0], "no features");
	EXPECT(!parse_table("259:1048575 4 limit 1048576 tmpfs /a%20b", &table), "all features");
	EXPECT(table.major == 259 && table.minor == 1048575, "all features");
	EXPECT(table.limit_blocks == 1048576 && !strcmp(table.tmpfs, "/a b"), "all features");
	EXPECT(table.cache_limit_blocks == NO_LIMIT && !table.cow_on_read, "all features");
	EXPECT(!parse_table("43:0 5 cow_on_read cow_on_cache cache_limit 9 queue_errors", &table),
	       "features of the cache");
	EXPECT(table.cow_on_read && table.cow_on_cache && table.queue_errors, "flags");
	EXPECT(table.cache_limit_blocks == 9 && table.limit_blocks == NO_LIMIT, "cache_limit");
	EXPECT(!parse_table(all, &table), "a line to be put together");
	EXPECT(!format_table(&table, line, sizeof(line)) && !strcmp(line, all), "the same line");
	EXPECT(format_table(&table, line, sizeof(line) - 1) < 0, "no room for the line");
	EXPECT(!parse_table("43:0 3 later limit 1", &table), "features of a later version");
	EXPECT(table.limit_blocks == 1, "features of a later version");
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *copy = exact(bad[i]);

		EXPECT(parse_table(copy, &table) < 0, copy);
		free(copy);
	}
	result("table lines");
}

#define REST	" 3 4 5 6 7 8/9 10 11 12 13 14"

static void test_status_lines(void)
{
	static const char *const bad[] = {
		"", "ok", "ok 1", "ok 1/", "ok /1", "ok 1/2", "ok 1/2 3 4 5 6", "Fail", "Error",
		"ok 1/2 3 4 5 6 7", "ok 1/2" REST, "ok 1/2" REST " -", "ok 1/x" REST " - 0 8",
		"ok 1-2" REST " - 0 8", "ok 1/2" REST " - x 8", "ok 1/2" REST " done 0 8",
		"ok 1/2" REST " :1/2 0 8", "ok 1/2" REST " done:1 0 8", "ok 1/2" REST " done:1/x 0 8",
		"ok 1/2" REST " a-state-that-is-longer:1/2 0 8", "ok 1/2 3 4 5 6 7 8 9 10 11 12 13 - 0 8",
		"a-health-word-that-is-longer-than-any 1/2" REST " - 0 8",
		"ok 99999999999999999999/2" REST " - 0 8", "ok 1/2" REST " - 99999999999999999999 8",
		"ok 1/2" REST " - 0 x",
	};
	struct cow_status status;

	EXPECT(!parse_status("base-error 1/2" REST " running:15/16 17 18", &status), "all fields");
	EXPECT(!strcmp(status.health, "base-error"), "health");
	EXPECT(status.used_blocks == 1 && status.limit_blocks == 2, "used/limit");
	EXPECT(status.peak_blocks == 3 && status.zeroed_blocks == 4, "peak and zeroed");
	EXPECT(status.metadata_bytes == 5 && status.writes_refused == 6, "metadata and refused");
	EXPECT(status.base_errors == 7, "base errors");
	EXPECT(status.cached_blocks == 8 && status.cache_limit_blocks == 9, "cached/limit");
	EXPECT(status.hit_sectors == 10 && status.missed_sectors == 11, "hits and misses");
	EXPECT(status.evicted_blocks == 12, "evicted");
	EXPECT(status.overlay_sectors == 13 && status.base_sectors == 14, "sectors read");
	EXPECT(!strcmp(status.prefetch, "running"), "prefetch");
	EXPECT(status.prefetch_done == 15 && status.prefetch_total == 16, "prefetch");
	EXPECT(status.queued == 17, "queued");
	EXPECT(!parse_status("ok 1/2" REST " - 0", &status), "an older module");
	EXPECT(!status.base_size_sectors, "an older module");
	EXPECT(!parse_status("base-error 1/2" REST " running:15/16 17 18", &status), "all again");
	EXPECT(status.base_size_sectors == 18, "size of the base");
	EXPECT(!parse_status("ok 0/- 0 0 4096 0 0 0/- 0 0 0 0 0 - 0 8", &status), "no limit");
	EXPECT(status.limit_blocks == NO_LIMIT, "no limit");
	EXPECT(status.cache_limit_blocks == NO_LIMIT && !status.prefetch[0], "no limit");
	EXPECT(!parse_status("full 1/2" REST " - 15 8 new fields", &status), "a later version");
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *copy = exact(bad[i]);

		EXPECT(parse_status(copy, &status) < 0, copy);
		free(copy);
	}
	result("status lines");
}

static void test_ranges(void)
{
	static const char *const bad[] = {
		"", "1G", "1G+2G", "a-b", "1-2-3", "2G-1G", "5-5", "1x-", "-0", "17E-", "--",
	};
	uint64_t start, end;

	EXPECT(!parse_range("1K-2M", &start, &end) && start == 1024 && end == 2 << 20, "both");
	EXPECT(!parse_range("-7", &start, &end) && !start && end == 7, "no start");
	EXPECT(!parse_range("7-", &start, &end) && start == 7 && end == UINT64_MAX, "no end");
	EXPECT(!parse_range("-", &start, &end) && !start && end == UINT64_MAX, "neither");
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char *copy = exact(bad[i]);

		EXPECT(parse_range(copy, &start, &end) < 0, copy);
		free(copy);
	}
	result("ranges");
}

static void test_times_and_thresholds(void)
{
	static const char *const no_times[] = {
		"", "s", "-1", "+1", ".5", "1.", "1.2345", "1,5", "1s", " 1", "31622401",
		"18446744073709551616",
	};
	static const char *const no_thresholds[] = {
		"", "0", "0%", "101%", "%", "80%%", "-1%", "80 %", "none", "1.5G", "16E",
		"18446744073709551616%",
	};
	unsigned int percent;
	uint64_t ms, bytes;

	EXPECT(!parse_seconds("10", &ms) && ms == 10000, "10");
	EXPECT(!parse_seconds("0.5", &ms) && ms == 500, "0.5");
	EXPECT(!parse_seconds("0.07", &ms) && ms == 70, "0.07");
	EXPECT(!parse_seconds("2.003", &ms) && ms == 2003, "2.003");
	for (size_t i = 0; i < sizeof(no_times) / sizeof(no_times[0]); i++) {
		char *copy = exact(no_times[i]);

		EXPECT(parse_seconds(copy, &ms) < 0, copy);
		free(copy);
	}
	EXPECT(!parse_threshold("80%", &percent, &bytes) && percent == 80 && !bytes, "80%");
	EXPECT(!parse_threshold("4K", &percent, &bytes) && !percent && bytes == 4096, "4K");
	for (size_t i = 0; i < sizeof(no_thresholds) / sizeof(no_thresholds[0]); i++) {
		char *copy = exact(no_thresholds[i]);

		EXPECT(parse_threshold(copy, &percent, &bytes) < 0, copy);
		free(copy);
	}
	result("times and thresholds");
}

static void test_mounts(void)
{
	static const char *const bad[] = {
		"", "36", "36 35 254:0", "36 35 254:0 /", "36 35 254 / /mnt rw", "x 35 254:0 / /mnt",
	};
	unsigned int major = 0, minor = 0;
	char *where = parse_mount("36 35 254:7 / /mnt/a\\040b rw,relatime shared:1 - ext4 x rw\n",
				  &major, &minor);

	EXPECT(where && !strcmp(where, "/mnt/a b"), "a mount point");
	EXPECT(major == 254 && minor == 7, "its device");
	free(where);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		EXPECT(!parse_mount(bad[i], &major, &minor), bad[i]);
	result("lines of mountinfo");
}

static void test_records(void)
{
	static const char *const bad[] = {
		"", "4711", "4711 /dev/sda nbd://h", "4711 /dev/nbd0/../sda nbd://h", "0 /dev/nbd0 x",
		"-1 /dev/nbd0 x", "x /dev/nbd0 nbd://h", " ",
	};
	struct nbd_link link;
	struct export export;

	EXPECT(parse_nbd_record("4711 /dev/nbd3 nbd://h/a b", &link) == 4711, "a connection");
	EXPECT(!strcmp(link.dev, "/dev/nbd3") && !strcmp(link.uri, "nbd://h/a b"), "a connection");
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		EXPECT(parse_nbd_record(bad[i], &link) == -EINVAL, bad[i]);
	EXPECT(!parse_export_record("nbd-server nbd://127.0.0.1:1", &export), "an export");
	EXPECT(!strcmp(export.server, "nbd-server"), "its server");
	EXPECT(!strcmp(export.uri, "nbd://127.0.0.1:1"), "its address");
	EXPECT(parse_export_record("", &export) == -EINVAL, "nothing");
	result("records");
}

/* What other programs and the kernel's log say. */
static void test_programs(void)
{
	static const char nbdkit[] = "/usr/sbin/nbdkit\0--pidfile\0/run/cowctl/a.pid\0-U\0s";
	static const char other[] = "vi\0/run/cowctl/a.pid";
	char log[] = "3,1000,5000000,-;device-mapper: table: 253:0: nbdcow: too long (-EINVAL)\n"
		     " SUBSYSTEM=block\n";
	char elsewhere[] = "3,1,5,-;device-mapper: nbdcow: too long\n", line[16] = "before";
	char said[] = "Negotiation: ..size = 1MB\rError: Read failed\n\nExiting.\n", nothing[] = "\n";
	char *error = table_error(log);

	EXPECT(is_server(nbdkit, sizeof(nbdkit) - 1, "/run/cowctl/a.pid"), "nbdkit");
	EXPECT(!is_server(nbdkit, sizeof(nbdkit) - 1, "/run/cowctl/b.pid"), "another's nbdkit");
	EXPECT(!is_server(nbdkit, sizeof(nbdkit) - 1, "/run/cowctl/a"), "part of a name");
	EXPECT(!is_server(other, sizeof(other) - 1, "/run/cowctl/a.pid"), "no server");
	EXPECT(!is_server("nbdkit", 6, ""), "no arguments");
	EXPECT(error && !strcmp(error, "too long (-EINVAL)"), "the kernel's reason");
	EXPECT(!table_error(elsewhere), "another line of the log");
	last_line(said, line, sizeof(line));
	EXPECT(!strcmp(line, "Error: Read fai"), line);
	last_line(nothing, line, sizeof(line));
	EXPECT(!strcmp(line, "Error: Read fai"), line);
	result("what programs say");
}

static void test_words_for_people(void)
{
	static const char *const words[] = { "base", "limit", "size", "round", NULL };
	static const struct {
		uint64_t bytes;
		const char *text;
		const char *brief;
	} sizes[] = {
		{ 0, "0 B", "0B" },
		{ 9, "9 B", "9B" },
		{ 1023, "1023 B", "1023B" },
		{ 1024, "1.0 KiB", "1.0K" },
		{ 4096, "4.0 KiB", "4.0K" },
		{ 10189, "10.0 KiB", "10K" },
		{ 1048575, "1.0 MiB", "1.0M" },
		{ 1536 << 10, "1.5 MiB", "1.5M" },
		{ 20ULL << 30, "20.0 GiB", "20G" },
		{ UINT64_MAX, "16.0 EiB", "16E" },
	};
	char buf[16];

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		human_size(sizes[i].bytes, buf);
		EXPECT(!strcmp(buf, sizes[i].text), buf);
		short_size(sizes[i].bytes, buf);
		EXPECT(!strcmp(buf, sizes[i].brief), buf);
	}
	EXPECT(nearest("bse", words) == words[0], "bse");
	EXPECT(nearest("limits", words) == words[1], "limits");
	EXPECT(nearest("sise", words) == words[2], "sise");
	EXPECT(!nearest("colour", words), "colour");
	EXPECT(!nearest("", words), "nothing");
	EXPECT(!nearest("a word that is very much longer than all of them", words), "long");
	result("words for people");
}

int main(void)
{
	test_names();
	test_sizes();
	test_limits();
	test_ranges();
	test_times_and_thresholds();
	test_ports();
	test_uris();
	test_quoting();
	test_tables();
	test_status_lines();
	test_mounts();
	test_records();
	test_programs();
	test_words_for_people();
	printf("1..%u\n", tests);
	return failures != 0;
}
