// SPDX-License-Identifier: GPL-2.0-only
/*
 * What people type, the kernel prints and other programs say, taken apart and put
 * together: functions that touch nothing but their arguments.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "cowctl.h"

/* Length of the UTF-8 character at @s, or 0 where there is none. */
static size_t utf8_length(const unsigned char *s)
{
	size_t n = *s < 0x80 ? 1 : *s >= 0xc2 && *s < 0xe0 ? 2 :
		   (*s & 0xf0) == 0xe0 ? 3 : *s >= 0xf0 && *s < 0xf5 ? 4 : 0;

	for (size_t i = 1; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	return n;
}

/* The same, or 0 for a control: ASCII's, or those that UTF-8 puts at U+0080 to U+009F. */
static size_t printable_length(const char *text)
{
	const unsigned char *s = (const unsigned char *)text;
	bool control = *s < 0x20 || *s == 0x7f || (*s == 0xc2 && s[1] < 0xa0);

	return control ? 0 : utf8_length(s);
}

/* Return: whether @text can be shown to people and put into JSON as it is. */
bool printable(const char *text)
{
	size_t n = 1;

	for (; *text && n; text += n)
		n = printable_length(text);
	return n;
}

/* Puts question marks where something cannot be shown. */
void make_printable(char *text)
{
	for (size_t n; *text; text += n) {
		n = printable_length(text);
		if (!n) {
			*text = '?';
			n = 1;
		}
	}
}

/* Return: why @name cannot be the name of a device, or NULL when it can. */
const char *name_error(const char *name)
{
	if (!*name)
		return "is empty";
	if (strlen(name) >= NAME_BYTES)
		return "is longer than 127 bytes";
	/* libdevmapper would take a backslash for a byte written as \xNN. */
	if (strpbrk(name, "/\\"))
		return "contains a slash or backslash";
	if (!printable(name))
		return "contains a character that cannot be printed";
	if (!strcmp(name, ".") || !strcmp(name, "..") || !strcmp(name, "control"))
		return "is reserved";
	return NULL;
}

/*
 * Device-mapper's names are ASCII; libdevmapper and udev write every other byte
 * as a backslash, an x and two digits. Return: -ENAMETOOLONG when that makes
 * the name too long.
 */
int mangle_name(const char *name, char mangled[NAME_BYTES])
{
	size_t n = 0;

	for (; *name; name++) {
		unsigned char c = *name;
		bool plain = isascii(c) && (isalnum(c) || strchr("#+-.:=@_", c));

		if (n + (plain ? 1 : 4) >= NAME_BYTES)
			return -ENAMETOOLONG;
		n += sprintf(mangled + n, plain ? "%c" : "\\x%02x", c);
	}
	mangled[n] = '\0';
	return 0;
}

/* Digits at *@text, which is moved past them. Return: -EINVAL, -ERANGE. */
static int parse_digits(const char **text, uint64_t *value)
{
	const char *s = *text;

	if (!isdigit((unsigned char)*s))
		return -EINVAL;
	for (*value = 0; isdigit((unsigned char)*s); s++)
		if (__builtin_mul_overflow(*value, 10, value) ||
		    __builtin_add_overflow(*value, (uint64_t)(*s - '0'), value))
			return -ERANGE;
	*text = s;
	return 0;
}

/* <digits>[K|M|G|T|P|E[iB]], powers of 1024. Return: -EINVAL, -ERANGE. */
int parse_size(const char *text, uint64_t *bytes)
{
	static const char units[] = "KMGTPE";
	const char *unit;
	int err = parse_digits(&text, bytes);

	if (err || !*text)
		return err;
	unit = strchr(units, toupper((unsigned char)*text));
	if (!unit || (text[1] && strcasecmp(text + 1, "iB")))
		return -EINVAL;
	if (__builtin_mul_overflow(*bytes, UINT64_C(1) << (10 * (unit - units + 1)), bytes))
		return -ERANGE;
	return 0;
}

/* none | <1..100>% of @ram_bytes | <size>; in whole blocks, at least one. */
int parse_limit(const char *text, uint64_t ram_bytes, uint64_t *blocks)
{
	const char *s = text;
	uint64_t value;
	int err;

	if (!strcmp(text, "none")) {
		*blocks = NO_LIMIT;
		return 0;
	}
	err = parse_digits(&s, &value);
	if (!err && !strcmp(s, "%")) {
		if (!value || value > 100)
			return -ERANGE;
		value = ram_bytes / 100 * value + ram_bytes % 100 * value / 100;
	} else {
		err = parse_size(text, &value);
		if (err)
			return err;
	}
	*blocks = value / BLOCK_BYTES;
	return *blocks ? 0 : -ERANGE;
}

/* <size>-<size>, either of which may be missing; in bytes. Return: -EINVAL, -ERANGE. */
int parse_range(const char *text, uint64_t *start, uint64_t *end)
{
	const char *dash = strchr(text, '-');
	char first[32];
	int err = 0;

	*start = 0;
	*end = UINT64_MAX;
	if (!dash || (size_t)(dash - text) >= sizeof(first))
		return -EINVAL;
	memcpy(first, text, dash - text);
	first[dash - text] = '\0';
	if (*first)
		err = parse_size(first, start);
	if (!err && dash[1])
		err = parse_size(dash + 1, end);
	return err ? err : *start < *end ? 0 : -ERANGE;
}

/* <digits>[.<up to three digits>], up to a year. Return: -EINVAL, -ERANGE. */
int parse_seconds(const char *text, uint64_t *ms)
{
	uint64_t seconds, unit = 1000;
	int err = parse_digits(&text, &seconds);

	if (err)
		return err;
	if (seconds > 366 * 86400)
		return -ERANGE;
	*ms = seconds * unit;
	if (*text == '.' && text[1])
		for (text++; isdigit((unsigned char)*text) && unit > 1; text++) {
			unit /= 10;
			*ms += (*text - '0') * unit;
		}
	return *text ? -EINVAL : 0;
}

/* <1..100>% of the limit, or a <size> from 1 on; the other is 0 then. */
int parse_threshold(const char *text, unsigned int *percent, uint64_t *bytes)
{
	const char *s = text;
	uint64_t value;
	int err = parse_digits(&s, &value);

	*percent = 0;
	*bytes = 0;
	if (!err && !strcmp(s, "%")) {
		if (!value || value > 100)
			return -ERANGE;
		*percent = value;
		return 0;
	}
	err = parse_size(text, bytes);
	return err ? err : *bytes ? 0 : -ERANGE;
}

/* Return: the port, or -EINVAL. */
int parse_port(const char *text)
{
	uint64_t port;

	if (parse_digits(&text, &port) || *text || !port || port > 65535)
		return -EINVAL;
	return port;
}

/* @length bytes at @text, with every %XX replaced by the byte it stands for. */
static int percent_decode(const char *text, size_t length, char *out, size_t size)
{
	size_t n = 0;

	for (size_t i = 0; i < length; i++) {
		char c = text[i];

		if (c == '%') {
			char hex[3] = { 0 };

			if (length - i < 3)
				return -EINVAL;
			memcpy(hex, text + i + 1, 2);
			if (!isxdigit((unsigned char)hex[0]) || !isxdigit((unsigned char)hex[1]))
				return -EINVAL;
			c = strtoul(hex, NULL, 16);
			i += 2;
		}
		if (!c)
			return -EINVAL;
		if (n + 1 >= size)
			return -ENAMETOOLONG;
		out[n++] = c;
	}
	out[n] = '\0';
	return 0;
}

/* host | host:port | [IPv6] | [IPv6]:port */
static int parse_host_port(const char *text, size_t length, struct nbd_uri *uri)
{
	const char *end = text + length, *host_end, *port;
	char number[6] = "10809";

	if (length && *text == '[') {
		host_end = memchr(text, ']', length);
		if (!host_end)
			return -EINVAL;
		text++;
		port = host_end + 1;
	} else {
		host_end = memchr(text, ':', length);
		if (!host_end)
			host_end = end;
		port = host_end;
	}
	if (port < end) {
		if (*port++ != ':' || end == port || end - port > 5)
			return -EINVAL;
		memset(number, 0, sizeof(number));
		memcpy(number, port, end - port);
		if (parse_port(number) < 0)
			return -EINVAL;
	}
	strcpy(uri->port, number);
	if (host_end == text)
		return -EINVAL;
	return percent_decode(text, host_end - text, uri->host, sizeof(uri->host));
}

/* nbd-client would take it for an option. */
static bool is_option(const char *word)
{
	return *word == '-' || strchr(word, '=');
}

/*
 * nbd://host[:port][/export] or nbd+unix:///[export]?socket=PATH
 *
 * Return: -EINVAL; -ENAMETOOLONG; -EPROTONOSUPPORT for another scheme, such as
 * those for TLS and vsock; -ENOTSUP for what cannot be given to nbd-client.
 */
int parse_nbd_uri(const char *text, struct nbd_uri *uri)
{
	static const char socket_key[] = "socket=";
	const char *path, *query;
	bool is_unix = !strncmp(text, "nbd+unix://", 11);
	int err;

	memset(uri, 0, sizeof(*uri));
	if (!is_unix && strncmp(text, "nbd://", 6))
		return -EPROTONOSUPPORT;
	/* It is written down in a line. */
	if (!printable(text))
		return -EINVAL;
	text += is_unix ? 11 : 6;

	query = strchrnul(text, '?');
	path = memchr(text, '/', query - text);
	if (!path)
		path = query;
	if (is_unix) {
		if (path != text || strncmp(query, "?", 1) ||
		    strncmp(query + 1, socket_key, strlen(socket_key)))
			return -EINVAL;
		query += 1 + strlen(socket_key);
		if (!*query || strchr(query, '&'))
			return -EINVAL;
		err = percent_decode(query, strlen(query), uri->socket, sizeof(uri->socket));
		query = strchrnul(text, '?');
	} else {
		err = *query ? -EINVAL : parse_host_port(text, path - text, uri);
	}
	if (err)
		return err;
	if (is_option(uri->host) || is_option(uri->socket))
		return -ENOTSUP;
	if (path < query)
		path++;
	return percent_decode(path, query - path, uri->export, sizeof(uri->export));
}

/* Copies the next word of *@line to @word. Return: 1, or 0 at the end, or -errno. */
static int next_word(const char **line, char *word, size_t size)
{
	const char *start = *line + strspn(*line, " ");
	size_t length = strcspn(start, " ");

	if (length >= size)
		return -ENAMETOOLONG;
	memcpy(word, start, length);
	word[length] = '\0';
	*line = start + length;
	return length != 0;
}

static int next_number(const char **line, uint64_t *value)
{
	char word[24];
	const char *s = word;
	int err = next_word(line, word, sizeof(word));

	if (err <= 0)
		return -EINVAL;
	err = parse_digits(&s, value);
	return err ? err : *s ? -EINVAL : 0;
}

/* In place: the kernel shows a blank in a path as \040, and some others likewise. */
void unescape_octal(char *text)
{
	char *out = text;

	while (*text) {
		unsigned int c;

		if (*text == '\\' && sscanf(text + 1, "%3o", &c) == 1 && c && c < 256 &&
		    strspn(text + 1, "01234567") >= 3) {
			*out++ = c;
			text += 4;
		} else {
			*out++ = *text++;
		}
	}
	*out = '\0';
}

/* All but the characters that are plain in URIs and in table lines becomes %XX. */
int percent_encode(const char *text, char *out, size_t size)
{
	size_t n = 0;

	for (; *text; text++) {
		unsigned char c = *text;
		bool plain = isascii(c) && (isalnum(c) || strchr("/-._~", c));

		if (n + (plain ? 1 : 3) >= size)
			return -ENAMETOOLONG;
		n += sprintf(out + n, plain ? "%c" : "%%%02X", c);
	}
	if (n >= size)
		return -ENAMETOOLONG;
	out[n] = '\0';
	return 0;
}

/* Return: of how many words it consists. */
static int format_limit(char word[48], const char *name, uint64_t blocks)
{
	if (blocks == NO_LIMIT)
		return 0;
	snprintf(word, 48, " %s %" PRIu64, name, blocks);
	return 2;
}

/* The table line that parse_table() reads. Return: 0, or -ENAMETOOLONG. */
int format_table(const struct cow_table *table, char *line, size_t size)
{
	char limit[48] = "", cache_limit[48] = "", tmpfs[3 * PATH_MAX] = "";
	int words = table->cow_on_read + table->cow_on_cache + table->queue_errors;

	words += format_limit(limit, "limit", table->limit_blocks);
	words += format_limit(cache_limit, "cache_limit", table->cache_limit_blocks);
	if (table->tmpfs[0]) {
		words += 2;
		if (percent_encode(table->tmpfs, tmpfs, sizeof(tmpfs)))
			return -ENAMETOOLONG;
	}
	return (size_t)snprintf(line, size, "%u:%u %d%s%s%s%s%s%s%s", table->major,
				table->minor, words, limit, tmpfs[0] ? " tmpfs " : "", tmpfs,
				table->cow_on_read ? " cow_on_read" : "",
				table->cow_on_cache ? " cow_on_cache" : "", cache_limit,
				table->queue_errors ? " queue_errors" : "") < size ?
	       0 : -ENAMETOOLONG;
}

/* Features this version does not know are those of a newer module: skipped. */
int parse_table(const char *params, struct cow_table *table)
{
	char word[3 * PATH_MAX];
	uint64_t major, minor;
	const char *s = word;
	int err;

	memset(table, 0, sizeof(*table));
	table->limit_blocks = NO_LIMIT;
	table->cache_limit_blocks = NO_LIMIT;
	if (next_word(&params, word, sizeof(word)) <= 0 || parse_digits(&s, &major) ||
	    *s++ != ':' || parse_digits(&s, &minor) || *s || major > UINT_MAX || minor > UINT_MAX)
		return -EINVAL;
	table->major = major;
	table->minor = minor;
	while ((err = next_word(&params, word, sizeof(word))) > 0) {
		if (!strcmp(word, "limit")) {
			err = next_number(&params, &table->limit_blocks);
		} else if (!strcmp(word, "cache_limit")) {
			err = next_number(&params, &table->cache_limit_blocks);
		} else if (!strcmp(word, "cow_on_read")) {
			table->cow_on_read = true;
			err = 0;
		} else if (!strcmp(word, "cow_on_cache")) {
			table->cow_on_cache = true;
			err = 0;
		} else if (!strcmp(word, "queue_errors")) {
			table->queue_errors = true;
			err = 0;
		} else if (!strcmp(word, "tmpfs")) {
			err = next_word(&params, word, sizeof(word)) > 0 ? 0 : -EINVAL;
			if (!err)
				err = percent_decode(word, strlen(word), table->tmpfs,
						     sizeof(table->tmpfs));
		} else {
			err = 0;
		}
		if (err)
			return err;
	}
	return err;
}

/*
 * Takes the next run, "<blocks><letter> ", off an answer to the message extents.
 * Return: 1, 0 at the end, or -EINVAL.
 */
int next_extent(const char **answer, uint64_t *blocks, char *kind)
{
	const char *s = *answer + strspn(*answer, " ");

	if (!*s)
		return 0;
	if (parse_digits(&s, blocks) || !*s || !strchr("bhoz", *s))
		return -EINVAL;
	*kind = *s++;
	*answer = s;
	return 1;
}

/* <number>/<number>, the second of which may be -: no limit. */
static int next_part(const char **line, uint64_t *used, uint64_t *limit)
{
	char word[48];
	const char *s = word;

	if (next_word(line, word, sizeof(word)) <= 0 || parse_digits(&s, used) || *s++ != '/')
		return -EINVAL;
	*limit = NO_LIMIT;
	return strcmp(s, "-") && (parse_digits(&s, limit) || *s) ? -EINVAL : 0;
}

/* - or <state>:<done>/<total> */
static int next_prefetch(const char **line, struct cow_status *status)
{
	char word[64];
	const char *s;
	int used = 0;

	if (next_word(line, word, sizeof(word)) <= 0)
		return -EINVAL;
	if (!strcmp(word, "-"))
		return 0;
	if (sscanf(word, "%15[a-z]:%n", status->prefetch, &used) != 1 || !used)
		return -EINVAL;
	s = word + used;
	if (parse_digits(&s, &status->prefetch_done) || *s++ != '/' ||
	    parse_digits(&s, &status->prefetch_total) || *s)
		return -EINVAL;
	return 0;
}

/*
 * <health> <used>/<limit> <peak> <zeroed> <metadata> <refused> <base errors>
 * <cached>/<cache limit> <hits> <misses> <evicted> <overlay> <base> <prefetch>
 * <queued> <base size> ...
 */
int parse_status(const char *params, struct cow_status *status)
{
	uint64_t *const numbers[] = {
		&status->peak_blocks, &status->zeroed_blocks, &status->metadata_bytes,
		&status->writes_refused, &status->base_errors,
		NULL,
		&status->hit_sectors, &status->missed_sectors, &status->evicted_blocks,
		&status->overlay_sectors, &status->base_sectors,
	};

	memset(status, 0, sizeof(*status));
	if (next_word(&params, status->health, sizeof(status->health)) <= 0 ||
	    next_part(&params, &status->used_blocks, &status->limit_blocks))
		return -EINVAL;
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		if (numbers[i] ? next_number(&params, numbers[i]) :
		    next_part(&params, &status->cached_blocks, &status->cache_limit_blocks))
			return -EINVAL;
	}
	if (next_prefetch(&params, status))
		return -EINVAL;
	if (next_number(&params, &status->queued))
		return -EINVAL;
	/* 0: the module is older than that field */
	return *params && next_number(&params, &status->base_size_sectors) ? -EINVAL : 0;
}

const char *human_size(uint64_t bytes, char buf[16])
{
	static const char units[] = "BKMGTPE";
	double value = bytes;
	int unit = 0;

	/* 1023.95 would be printed as 1024.0 */
	for (; value >= 1023.95 && units[unit + 1]; unit++)
		value /= 1024;
	if (!unit)
		snprintf(buf, 16, "%" PRIu64 " B", bytes);
	else
		snprintf(buf, 16, "%.1f %ciB", value, units[unit]);
	return buf;
}

/* "9.9M", "1023K": at most five characters */
const char *short_size(uint64_t bytes, char buf[16])
{
	static const char units[] = "BKMGTPE";
	double value = bytes;
	int unit = 0;

	for (; value >= 1023.5 && units[unit + 1]; unit++)
		value /= 1024;
	snprintf(buf, 16, unit && value < 9.95 ? "%.1f%c" : "%.0f%c", value, units[unit]);
	return buf;
}

/* Levenshtein's distance; words longer than the row are simply far apart. */
static size_t distance(const char *a, const char *b)
{
	size_t row[32], len = strlen(b);

	if (len >= 32)
		return SIZE_MAX;
	for (size_t j = 0; j <= len; j++)
		row[j] = j;
	for (size_t i = 0; a[i]; i++) {
		size_t corner = row[0];

		row[0] = i + 1;
		for (size_t j = 0; j < len; j++) {
			size_t best = corner + (a[i] != b[j]);

			corner = row[j + 1];
			if (row[j] + 1 < best)
				best = row[j] + 1;
			if (corner + 1 < best)
				best = corner + 1;
			row[j + 1] = best;
		}
	}
	return row[len];
}

/* Return: the one of @words (ends with NULL) that @word was meant to be, or NULL. */
const char *nearest(const char *word, const char *const *words)
{
	const char *found = NULL;
	size_t best = 3;

	for (; *words; words++) {
		size_t d = distance(word, *words);

		if (d < best && 2 * d <= strlen(*words)) {
			best = d;
			found = *words;
		}
	}
	return found;
}

/* A line of /proc/self/mountinfo. Return: where it is mounted, to be freed, or NULL. */
char *parse_mount(const char *line, unsigned int *major, unsigned int *minor)
{
	char *where = NULL;

	if (sscanf(line, "%*d %*d %u:%u %*s %ms", major, minor, &where) != 3)
		return NULL;
	unescape_octal(where);
	return where;
}

/* <pid> <device> <address>, as nbd.c writes it. Return: the pid, or -EINVAL. */
long parse_nbd_record(const char *text, struct nbd_link *link)
{
	int used = 0;
	long pid;

	memset(link, 0, sizeof(*link));
	if (sscanf(text, "%ld %31s %n", &pid, link->dev, &used) != 2 || !used || pid <= 0 ||
	    strncmp(link->dev, "/dev/nbd", 8) || strchr(link->dev + 5, '/'))
		return -EINVAL;
	snprintf(link->uri, sizeof(link->uri), "%s", text + used);
	return pid;
}

/* <server> <address>, as export.c writes it. */
int parse_export_record(const char *text, struct export *export)
{
	int used = 0;

	memset(export, 0, sizeof(*export));
	if (sscanf(text, "%15s %n", export->server, &used) != 1 || !used)
		return -EINVAL;
	snprintf(export->uri, sizeof(export->uri), "%s", text + used);
	return 0;
}

/*
 * @args has the @size bytes of a /proc/<pid>/cmdline and a NUL. Return: whether it is
 * that of a server which was given @pid_file.
 */
bool is_server(const char *args, size_t size, const char *pid_file)
{
	const char *base = strrchr(args, '/') ? strrchr(args, '/') + 1 : args;

	if (strcmp(base, "nbdkit") && strcmp(base, "nbd-server"))
		return false;
	for (const char *arg = args; arg < args + size; arg += strlen(arg) + 1)
		if (!strcmp(arg, pid_file))
			return true;
	return false;
}

/* A record of /dev/kmsg. Return: why, according to it, the table was refused, or NULL. */
char *table_error(char *record)
{
	static const char mark[] = ": nbdcow: ";
	char *s = strstr(record, "device-mapper: table:");

	s = s ? strstr(s, mark) : NULL;
	if (!s)
		return NULL;
	s += strlen(mark);
	s[strcspn(s, "\n")] = '\0';
	return s;
}

/* The last line that tells something; nbd-client ends with one that does not. */
void last_line(char *text, char *line, size_t size)
{
	char *save = NULL;

	for (char *s = strtok_r(text, "\r\n", &save); s; s = strtok_r(NULL, "\r\n", &save))
		if (strcmp(s, "Exiting."))
			snprintf(line, size, "%s", s);
}
