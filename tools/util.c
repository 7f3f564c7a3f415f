// SPDX-License-Identifier: GPL-2.0-only
/*
 * What every layer needs: parsers that touch nothing but their arguments,
 * messages, small files, and programs run with a deadline.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

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

/* Return: whether @text can be shown to people and put into JSON as it is. */
bool printable(const char *text)
{
	const unsigned char *s = (const unsigned char *)text;

	while (*s) {
		size_t n = utf8_length(s);

		/* ASCII controls, and those that UTF-8 puts at U+0080 to U+009F */
		if (!n || *s < 0x20 || *s == 0x7f || (*s == 0xc2 && s[1] < 0xa0))
			return false;
		s += n;
	}
	return true;
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
	if (host_end == text || *text == '-')
		return -EINVAL;
	return percent_decode(text, host_end - text, uri->host, sizeof(uri->host));
}

/*
 * nbd://host[:port][/export] or nbd+unix:///[export]?socket=PATH
 *
 * Return: -EINVAL; -ENAMETOOLONG; -EPROTONOSUPPORT for another scheme, such as
 * those for TLS and vsock.
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

/* Features this version does not know are those of a newer module: skipped. */
int parse_table(const char *params, struct cow_table *table)
{
	char word[3 * PATH_MAX];
	int used = 0, err;

	memset(table, 0, sizeof(*table));
	table->limit_blocks = NO_LIMIT;
	table->cache_limit_blocks = NO_LIMIT;
	if (next_word(&params, word, sizeof(word)) <= 0 ||
	    sscanf(word, "%9u:%9u%n", &table->major, &table->minor, &used) != 2 || word[used])
		return -EINVAL;
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
 * <queued> ...
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
	return next_number(&params, &status->queued);
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

		if (d < best && d < strlen(*words)) {
			best = d;
			found = *words;
		}
	}
	return found;
}

/* The nbdkit plugin has its own. */
void __attribute__((weak)) put_message(const char *text)
{
	fprintf(stderr, "cowctl: %s\n", text);
}

static void message(const char *fmt, va_list ap)
{
	char text[8192];

	/* Names and paths may hold terminal controls; one line, nothing else. */
	vsnprintf(text, sizeof(text), fmt, ap);
	for (char *s = text; *s; s++)
		if (iscntrl((unsigned char)*s))
			*s = '?';
	put_message(text);
}

/* Prints the one message of a failure. Return: @err. */
int fail(int err, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	message(fmt, ap);
	va_end(ap);
	return err;
}

void warn(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	message(fmt, ap);
	va_end(ap);
}

int exit_code(int err)
{
	switch (-err) {
	case 0:
		return EXIT_SUCCESS;
	case EINVAL:
		return EXIT_USAGE;
	case ENODEV:
		return EXIT_NO_DEVICE;
	case EEXIST:
	case EBUSY:
	case EADDRINUSE:
		return EXIT_IN_USE;
	case EPERM:
	case EACCES:
		return EXIT_NOT_PERMITTED;
	case ENOPKG:
		return EXIT_MISSING;
	case EDQUOT:
		return EXIT_CACHE_FULL;
	default:
		return EXIT_FAILURE;
	}
}

char *xasprintf(const char *fmt, ...)
{
	va_list ap;
	char *text;
	int n;

	va_start(ap, fmt);
	n = vasprintf(&text, fmt, ap);
	va_end(ap);
	if (n < 0) {
		warn("out of memory");
		abort();
	}
	return text;
}

/* The first line of a small file, without its newline. */
int read_line(const char *path, char *buf, size_t size)
{
	FILE *file = fopen(path, "re");
	int err = 0;

	if (!file)
		return -errno;
	if (!fgets(buf, size, file))
		err = -ENODATA;
	else
		buf[strcspn(buf, "\n")] = '\0';
	fclose(file);
	return err;
}

/* Whole or not at all: readers never see half a file. */
int write_file(const char *path, const char *text)
{
	char *temp = xasprintf("%s.new", path);
	int fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	int err = 0;

	if (fd < 0) {
		err = -errno;
	} else {
		if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
			err = -EIO;
		close(fd);
		if (!err && rename(temp, path))
			err = -errno;
		if (err)
			unlink(temp);
	}
	free(temp);
	return err;
}

/* The signals that ask us to stop. */
/* TMPDIR where it names a tmpfs, as a word of the table; otherwise NULL. */
char *tmpfs_from_environment(void)
{
	const char *dir = getenv("TMPDIR");
	char *full, word[3 * PATH_MAX];
	struct statfs fs;

	if (!dir || !*dir)
		return NULL;
	full = realpath(dir, NULL);
	if (!full || statfs(full, &fs) || fs.f_type != TMPFS_MAGIC ||
	    percent_encode(full, word, sizeof(word))) {
		warn("TMPDIR=%s is not on a tmpfs; what is written stays in memory, but not there",
		     dir);
		free(full);
		return NULL;
	}
	free(full);
	return xasprintf("%s", word);
}

void stop_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGINT);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGHUP);
}

/*
 * main() blocks the signals that ask us to stop. They stay pending while the
 * command undoes its steps, and take effect when main() unblocks them.
 */
bool interrupted(void)
{
	sigset_t set;

	sigpending(&set);
	return sigismember(&set, SIGINT) || sigismember(&set, SIGTERM) ||
	       sigismember(&set, SIGHUP);
}

int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * INT64_C(1000) + ts.tv_nsec / 1000000;
}

static void __attribute__((noreturn)) run_child(const struct run *run, int err_fd, pid_t parent)
{
	int null = open("/dev/null", O_RDWR);
	sigset_t none;

	/* A cowctl that is killed takes along what it is waiting for. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(126);
	sigemptyset(&none);
	if (!run->finish)
		sigprocmask(SIG_SETMASK, &none, NULL);
	if (run->keep_fd >= 0)
		fcntl(run->keep_fd, F_SETFD, 0);
	if (run->in_child && run->in_child(run->arg))
		_exit(126);
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	dup2(err_fd, STDERR_FILENO);
	execvp(run->argv[0], (char *const *)run->argv);
	_exit(errno == ENOENT ? 127 : 126);
}

/* Keeps the last line that tells something; nbd-client ends with one that does not. */
static void keep_last_line(struct run *run, char *text)
{
	char *save = NULL;

	for (char *s = strtok_r(text, "\r\n", &save); s; s = strtok_r(NULL, "\r\n", &save))
		if (*s && strcmp(s, "Exiting."))
			snprintf(run->message, sizeof(run->message), "%s", s);
}

/* Waits for @pid_fd, until @run's deadline or a signal; reads @err_fd meanwhile. */
static int run_wait(struct run *run, int pid_fd, int err_fd)
{
	int64_t end = now_ms() + run->timeout_ms;
	char text[4096];
	sigset_t set;
	int err = 0, signals;

	stop_signals(&set);
	signals = run->finish ? -1 : signalfd(-1, &set, SFD_CLOEXEC);
	for (;;) {
		struct pollfd fds[] = {
			{ .fd = pid_fd, .events = POLLIN },
			{ .fd = signals, .events = POLLIN },
			{ .fd = err_fd, .events = POLLIN },
		};
		int64_t left = end - now_ms();
		ssize_t n;

		if (left <= 0 || poll(fds, 3, left) <= 0) {
			err = -ETIMEDOUT;
			break;
		}
		if (fds[2].revents & POLLIN) {
			n = read(err_fd, text, sizeof(text) - 1);
			text[n > 0 ? n : 0] = '\0';
			keep_last_line(run, text);
			continue;
		}
		if (fds[2].revents)
			err_fd = -1;
		if (fds[1].revents)
			err = -EINTR;
		if (fds[0].revents || fds[1].revents)
			break;
	}
	if (signals >= 0)
		close(signals);
	return err;
}

/*
 * Runs a program without a shell, with no input and its output discarded.
 *
 * Return: its exit status, or -errno with the message printed: -ENOPKG when it
 * is not installed, -ETIMEDOUT and -EINTR when it had to be killed.
 */
int run(struct run *run)
{
	int fds[2], pid_fd, status, err;
	pid_t self = getpid(), pid;

	run->message[0] = '\0';
	if (pipe2(fds, O_CLOEXEC))
		return fail(-errno, "cannot make a pipe: %m");
	pid = fork();
	if (pid < 0) {
		err = -errno;
		close(fds[0]);
		close(fds[1]);
		return fail(err, "cannot start %s: %s", run->argv[0], strerror(-err));
	}
	if (!pid)
		run_child(run, fds[1], self);
	close(fds[1]);
	pid_fd = pidfd_open(pid, 0);
	err = run_wait(run, pid_fd, fds[0]);
	if (err)
		kill(pid, SIGKILL);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	close(pid_fd);
	close(fds[0]);
	if (err == -EINTR)
		return err;
	if (err)
		return fail(err, "%s did not finish within %d seconds", run->argv[0],
			    run->timeout_ms / 1000);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
		return fail(-ENOPKG, "%s is not installed; it is in the package %s",
			    run->argv[0], run->package);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
