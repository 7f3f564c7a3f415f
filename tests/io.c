// SPDX-License-Identifier: GPL-2.0-only
/*
 * io - plays a list of reads, writes and discards on a block device and checks
 * every byte of them
 *
 * See usage() for the commands. Anything that goes otherwise than the list
 * says is told in a line that begins with '#', and the exit status is 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <malloc.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <dirent.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dmctl.h"
#include "stamp.h"

#define BLOCK 4096
#define CHUNK (1 << 20)		/* bytes of one request of a long command */
#define BIGGEST (4 << 20)	/* bytes of the longest request there is */
#define WORDS 12		/* words of a command */
#define JOBS 320		/* commands in the background */
#define DEADLINE 120		/* seconds to wait for a condition */

static const char *path, *main_path;
static int fd = -1;
static bool buffered;
static uint64_t bytes;		/* size of the device */
static unsigned int unit;	/* bytes of a logical block of it */

/* What each sector should hold, by tag; NULL until the model command. */
static uint32_t *model;

/* One command in the background. */
static struct job {
	pthread_t thread;
	char *text;
	volatile bool done;
} jobs[JOBS];
static unsigned int nr_jobs;

/* One request that the kernel has. */
static struct request {
	struct iocb iocb;
	char *text;
	char *buf;
	int want;		/* how it should end: 0 or -errno */
	bool done;
} requests[JOBS];
static unsigned int nr_requests;
static aio_context_t aio;

/* Where buffers begin in a page. */
static size_t shift;

/* What precedes each message, as long as faults are injected. */
static char round_text[100];

static void usage(void)
{
	puts("usage: io [-b] DEVICE COMMAND...\n"
	     "Each command is one argument; -b goes through the page cache.\n"
	     "OFFSET and LENGTH are bytes, or end in s (sectors), k, M, G or T; LENGTH may be `end`.\n"
	     "TAG is `.` for what a base holds, `0` for zeroes, `?` for anything, or a letter.\n"
	     "\n"
	     "write OFFSET LENGTH TAG       check OFFSET LENGTH TAG\n"
	     "is OFFSET TAGS                one tag a sector, e.g. `is 4k .AA.....`\n"
	     "discard | zeroout | punch | zerorange OFFSET LENGTH\n"
	     "flush                         fsync; drop: also drop the page cache\n"
	     "shift BYTES                   buffers begin so far behind a page's beginning\n"
	     "fua OFFSET LENGTH TAG         a write with RWF_DSYNC\n"
	     "nowait write|check ...        with RWF_NOWAIT\n"
	     "fails ERRNO COMMAND           the command must fail that way\n"
	     "submit [nowait] write ...     leaves the request to the kernel; `reap` waits\n"
	     "                              for all of them; may follow `fails ERRNO`\n"
	     "bg COMMAND                    runs it in a thread; `join` waits for all\n"
	     "pending N                     N requests and threads have not ended\n"
	     "asleep FUNCTION               waits until a thread sleeps there in the kernel\n"
	     "create NAME SECTORS TARGET .. makes a device-mapper device; views are read-only\n"
	     "remove NAME | absent NAME     takes it away; if there is one\n"
	     "open NAME                     goes on with that one, and `open -` with DEVICE\n"
	     "load NAME SECTORS TARGET ...  loads a table for a device-mapper device\n"
	     "reload NAME SECTORS TARGET .. and takes it over\n"
	     "suspend NAME | resume NAME    resume takes the new table, if there is one\n"
	     "message NAME ...              sends it a message\n"
	     "status NAME FIELD=VALUE...    fields of an overlay's status\n"
	     "await NAME FIELD=VALUE...     waits until they are so\n"
	     "prefetch NAME BLOCK BLOCKS    sends that message and waits for the end: EIO if the\n"
	     "                              base failed, ENOMEM if something did not fit\n"
	     "inflight DEVICE N             waits until DEVICE has N requests in flight\n"
	     "held NAME N                   waits until the dm-delay device holds N reads\n"
	     "run PROGRAM [ARG...]          must exit with 0\n"
	     "echo TEXT FILE                writes that to the file, which need not succeed\n"
	     "reject N NAME SECTORS ...     loads a table that is no good, N times\n"
	     "timed N COMMAND               N times; prints the shortest in microseconds\n"
	     "faults COMMAND                lets each allocation and request fail in turn, see below\n"
	     "size N                        the device has N bytes\n"
	     "sum                           prints a checksum of the device\n"
	     "\n"
	     "model N                       from now on the commands keep a model of the\n"
	     "                              device; its first N bytes are as in the base\n"
	     "sweep                         writes and reads of every alignment over every\n"
	     "                              mixture of three blocks; wants 97,200 KiB\n"
	     "random SEED N                 N random reads, writes, discards and zeroings\n"
	     "verify                        compares the whole device with the model\n"
	     "\n"
	     "faults COMMAND                runs the command while its first, second and so on\n"
	     "                              allocation or request fails, and while all fail from\n"
	     "                              there on. After a failure each block must be as before\n"
	     "                              or as wanted, and the command must work again. Then,\n"
	     "                              and after success, the device must be as in the model.\n"
	     "                              It is an error if there was no fault.\n"
	     "before | after COMMAND         at the start and the end of each of these rounds\n"
	     "failed COMMAND                after each failure\n"
	     "try COMMAND                   may fail, and has then changed nothing");
}

static void __attribute__((format(printf, 1, 2), noreturn)) die(const char *fmt, ...)
{
	va_list args;

	flockfile(stdout);
	printf("# %s: %s", path, round_text);
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
	_exit(1);
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ULL + ts.tv_nsec / 1000000;
}

static void nap(void)
{
	struct timespec ts = { .tv_nsec = 1000000 };

	nanosleep(&ts, NULL);
}

static void *get_buffer(size_t len)
{
	void *buf;

	if (posix_memalign(&buf, BLOCK, len + shift))
		die("out of memory");
	return (char *)buf + shift;
}

static void put_buffer(void *buf)
{
	if (buf)
		free((char *)buf - (uintptr_t)buf % BLOCK);
}

static uint64_t parse_bytes(const char *text, uint64_t offset)
{
	static const char suffixes[] = "skMGT";
	static const unsigned int shifts[] = { 9, 10, 20, 30, 40 };
	const char *at;
	char *end;
	uint64_t n;

	if (!strcmp(text, "end"))
		return bytes - offset;
	n = strtoull(text, &end, 0);
	if (end == text)
		die("%s is no number", text);
	if (!*end)
		return n;
	at = strchr(suffixes, *end);
	if (!at || end[1])
		die("%s is no number", text);
	return n << shifts[at - suffixes];
}

static uint32_t parse_tag(char c)
{
	if (c == '.')
		return TAG_BASE;
	if (c == '0')
		return TAG_ZERO;
	if (c == '?')
		return STAMP_UNKNOWN;
	if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'))
		return TAG_FIRST + c;
	die("%c is no tag", c);
}

static int parse_errno(const char *name)
{
	static const struct {
		const char *name;
		int value;
	} errors[] = {
		{ "EAGAIN", EAGAIN }, { "EINVAL", EINVAL }, { "EIO", EIO },
		{ "ENOSPC", ENOSPC }, { "ENOMEM", ENOMEM }, { "EOPNOTSUPP", EOPNOTSUPP },
	};
	unsigned int i;

	for (i = 0; i < sizeof(errors) / sizeof(errors[0]); i++)
		if (!strcmp(errors[i].name, name))
			return errors[i].value;
	die("unknown error %s", name);
}

/*
 * Reads or writes the whole of a vector. @flags are those of preadv2.
 * Returns: 0, or -errno of the first error.
 */
static int transfer(bool is_write, struct iovec *iov, int count, uint64_t offset, int flags)
{
	while (count) {
		ssize_t n = is_write ? pwritev2(fd, iov, count, offset, flags) :
				       preadv2(fd, iov, count, offset, flags);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			die("end of the device at %" PRIu64, offset);
		offset += n;
		while (count && (size_t)n >= iov->iov_len) {
			n -= iov->iov_len;
			iov++;
			count--;
		}
		if (n) {
			iov->iov_base = (char *)iov->iov_base + n;
			iov->iov_len -= n;
		}
	}
	return 0;
}

/* The tag that sector number @i of a command ought to have, or STAMP_UNKNOWN for any. */
typedef uint32_t (*tag_fn)(uint64_t sector, uint64_t i, const void *arg);

static uint32_t tag_one(uint64_t sector, uint64_t i, const void *arg)
{
	(void)sector;
	(void)i;
	return *(const uint32_t *)arg;
}

static uint32_t tag_string(uint64_t sector, uint64_t i, const void *arg)
{
	(void)sector;
	return parse_tag(((const char *)arg)[i]);
}

static uint32_t tag_model(uint64_t sector, uint64_t i, const void *arg)
{
	(void)i;
	(void)arg;
	return model[sector];
}

static void compare(const char *buf, uint64_t offset, uint64_t len, uint64_t done,
		    tag_fn tag, const void *arg, const char *what)
{
	uint64_t i;

	for (i = 0; i < len / SECTOR; i++) {
		uint64_t sector = offset / SECTOR + i;
		uint32_t want = tag(sector, done / SECTOR + i, arg);

		if (want == STAMP_UNKNOWN || stamp_tag(buf + i * SECTOR, sector) == want)
			continue;
		flockfile(stdout);
		printf("# %s: %s: sector %" PRIu64 " (block %" PRIu64 ") should have tag %u but has ",
		       path, what, sector, sector / SECTORS_PER_BLOCK, want);
		stamp_print(stdout, buf + i * SECTOR, sector);
		putchar('\n');
		fflush(stdout);
		_exit(1);
	}
}

static int do_check(uint64_t offset, uint64_t len, tag_fn tag, const void *arg, int flags,
		    const char *what)
{
	uint64_t done = 0, n;
	char *buf = get_buffer(CHUNK);
	int ret = 0;

	while (done < len && !ret) {
		n = len - done < CHUNK ? len - done : CHUNK;
		/* what was in the buffer must not look right */
		memset(buf, 0x5a, n);
		ret = transfer(false, &(struct iovec){ buf, n }, 1, offset + done, flags);
		if (!ret)
			compare(buf, offset + done, n, done, tag, arg, what);
		done += n;
	}
	put_buffer(buf);
	return ret;
}

static void model_set(uint64_t offset, uint64_t len, uint32_t tag)
{
	uint64_t i;

	if (model)
		for (i = offset / SECTOR; i < (offset + len) / SECTOR; i++)
			model[i] = tag;
}

static int do_write(uint64_t offset, uint64_t len, uint32_t tag, int flags)
{
	uint64_t done = 0, n;
	char *buf = get_buffer(CHUNK);
	int ret = 0;

	while (done < len && !ret) {
		n = len - done < CHUNK ? len - done : CHUNK;
		stamp_range(buf, (offset + done) / SECTOR, n / SECTOR, tag);
		ret = transfer(true, &(struct iovec){ buf, n }, 1, offset + done, flags);
		if (!ret)
			model_set(offset + done, n, tag);
		done += n;
	}
	put_buffer(buf);
	return ret;
}

static int do_flush(bool drop)
{
	if (fsync(fd) || (drop && ioctl(fd, BLKFLSBUF)))
		return -errno;
	return 0;
}

/*
 * A block that the end of the device cuts was discarded up to there: that may
 * have cleared it as a whole, or done nothing.
 */
static void model_discarded_end(void)
{
	uint64_t offset = bytes / BLOCK * BLOCK;
	char *buf = get_buffer(BLOCK);

	if (transfer(false, &(struct iovec){ buf, bytes - offset }, 1, offset, 0))
		die("cannot read the end");
	if (stamp_tag(buf, offset / SECTOR) == TAG_ZERO)
		model_set(offset, bytes - offset, TAG_ZERO);
	compare(buf, offset, bytes - offset, 0, tag_model, NULL, "end after a discard");
	put_buffer(buf);
}

static int clear_once(const char *how, uint64_t *range)
{
	int ret;

	if (!strcmp(how, "discard"))
		ret = ioctl(fd, BLKDISCARD, range);
	else if (!strcmp(how, "zeroout"))
		ret = ioctl(fd, BLKZEROOUT, range);
	else if (!strcmp(how, "punch"))
		ret = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range[0], range[1]);
	else
		ret = fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, range[0], range[1]);
	return ret ? -errno : 0;
}

/*
 * Discards, zeroes and so on, by the name of the command. The kernel zeroes
 * the edges of cached pages at a discard, though the device keeps the partial
 * blocks there: look past the cache from then on.
 */
static int do_clear(const char *how, uint64_t offset, uint64_t len)
{
	uint64_t range[2] = { offset, len };
	uint64_t first = offset, last = offset + len;
	unsigned int retries = 1000;
	int ret;

	if (buffered) {
		ret = do_flush(false);
		if (ret)
			return ret;
	}
	do {
		ret = clear_once(how, range);
		/* so the kernel says while a table is being exchanged */
	} while (ret == -EOPNOTSUPP && --retries && (nap(), true));
	if (ret)
		return ret;
	if (buffered) {
		ret = do_flush(true);
		if (ret)
			return ret;
	}
	if (!model)
		return 0;
	if (!strcmp(how, "discard")) {
		first = (offset + BLOCK - 1) / BLOCK * BLOCK;
		if (last == bytes && last % BLOCK)
			model_discarded_end();
		last = last / BLOCK * BLOCK;
	}
	if (first < last)
		model_set(first, last - first, TAG_ZERO);
	return 0;
}

static void do_inflight(const char *device, unsigned int want)
{
	uint64_t end = now_ms() + DEADLINE * 1000;
	unsigned int reads = 0, writes = 0;
	char name[64];
	struct stat st;

	if (stat(device, &st) || !S_ISBLK(st.st_mode))
		die("%s is no block device", device);
	snprintf(name, sizeof(name), "/sys/dev/block/%u:%u/inflight", major(st.st_rdev),
		 minor(st.st_rdev));
	for (;;) {
		FILE *f = fopen(name, "r");

		if (!f || fscanf(f, "%u %u", &reads, &writes) != 2)
			die("cannot read %s", name);
		fclose(f);
		if (reads + writes == want)
			return;
		if (now_ms() > end)
			die("%s has %u requests in flight after %u s, not %u", device,
			    reads + writes, DEADLINE, want);
		nap();
	}
}

/* Waits until the dm-delay device @name holds @want reads back. */
static void do_held(const char *name, unsigned int want)
{
	uint64_t end = now_ms() + DEADLINE * 1000;
	struct dm_call call;
	unsigned int held;

	for (;;) {
		if (dm_status(name, &call) || sscanf(call.table.params, "%u", &held) != 1)
			die("%s has no status", name);
		if (held == want)
			return;
		if (now_ms() > end)
			die("%s holds %u reads after %u s, not %u", name, held, DEADLINE, want);
		nap();
	}
}

static void do_run(char **argv)
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (!pid) {
		execvp(argv[0], argv);
		_exit(127);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid: %s", strerror(errno));
	if (status)
		die("%s %s ended with status %d", argv[0], argv[1] ? argv[1] : "", status);
}

static void do_echo(const char *text, const char *file)
{
	int out = open(file, O_WRONLY | O_CLOEXEC);

	if (out < 0)
		die("%s: %s", file, strerror(errno));
	if (write(out, text, strlen(text)) < 0)
		errno = 0;
	close(out);
}

/* The words from the one at @words on, with blanks between. */
static void join_words(char *text, size_t size, char **words)
{
	size_t n = 0;

	text[0] = '\0';
	for (; *words && n < size; words++)
		n += snprintf(text + n, size - n, "%s%s", n ? " " : "", *words);
}

static int do_load(char **words)
{
	char params[1024];

	join_words(params, sizeof(params), words + 3);
	return dm_load_flags(words[0], parse_bytes(words[1], 0), words[2], params,
			     strcmp(words[2], "nbdcow-view") ? 0 : DM_READONLY_FLAG);
}

static int do_reload(char **words)
{
	int ret = do_load(words);

	return ret ? ret : dm_resume(words[0]);
}

static int do_create(char **words)
{
	int ret = dm_create(words[0]);

	return ret ? ret : do_reload(words);
}

static void do_absent(const char *name)
{
	int ret = dm_remove(name);

	if (ret && ret != -ENXIO)
		die("cannot remove %s: %s", name, strerror(-ret));
}

static void open_device(const char *name)
{
	int mode = O_CLOEXEC | (buffered ? 0 : O_DIRECT);
	struct stat st;

	if (fd >= 0)
		close(fd);
	path = name;
	/* some devices are read-only, and some commands want nothing else */
	fd = open(path, O_RDWR | mode);
	if (fd < 0 && (errno == EACCES || errno == EROFS || errno == EPERM))
		fd = open(path, O_RDONLY | mode);
	if (fd < 0)
		die("%s", strerror(errno));
	if (fstat(fd, &st) || !S_ISBLK(st.st_mode) || ioctl(fd, BLKGETSIZE64, &bytes) ||
	    ioctl(fd, BLKSSZGET, &unit))
		die("no block device");
}

/* Opens a device-mapper device by its name, since nobody may have made a link, or DEVICE. */
static void do_open(const char *name)
{
	static char node[32];
	unsigned int number;

	free(model);
	model = NULL;
	if (!strcmp(name, "-")) {
		open_device(main_path);
		return;
	}
	if (dm_minor(name, &number))
		die("there is no %s", name);
	snprintf(node, sizeof(node), "/dev/dm-%u", number);
	open_device(node);
}

static void do_reject(unsigned int count, char **words)
{
	while (count--)
		if (do_load(words) != -EINVAL)
			die("'%s' was not rejected", words[3] ? words[3] : "");
}

static int do_message(char **words)
{
	char text[1024];

	join_words(text, sizeof(text), words + 1);
	return dm_message(words[0], text);
}

/*
 * Each of @words but the first is FIELD=VALUE. Leaves one that is not so, or NULL, in
 * @wrong.
 */
static int look_at_status(char **words, struct dm_call *call, const char **wrong)
{
	static const char *const names[] = {
		"health", "used", "limit", "peak", "zeroed", "metadata", "refused", "errors",
		"cached", "cache_limit", "hits", "misses", "evicted", "overlay", "base", "prefetch",
	};
	unsigned int i;
	int ret = dm_status(words[0], call);

	*wrong = NULL;
	if (ret)
		return ret;
	for (words++; *words && !*wrong; words++) {
		const char *at = call->table.params;
		size_t len = strcspn(*words, "="), n;

		for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
			if (!strncmp(names[i], *words, len) && !names[i][len])
				break;
			at += strcspn(at, " /");
			at += strspn(at, " /");
		}
		if (i == sizeof(names) / sizeof(names[0]) || !(*words)[len])
			die("the status has no field %s", *words);
		n = strcspn(at, " /");
		if (strlen(*words + len + 1) != n || strncmp(at, *words + len + 1, n))
			*wrong = *words;
	}
	return 0;
}

static int do_status(char **words)
{
	struct dm_call call;
	const char *wrong;
	int ret = look_at_status(words, &call, &wrong);

	if (!ret && wrong)
		die("expected %s in the status, %s", wrong, call.table.params);
	return ret;
}

static int do_await(char **words)
{
	uint64_t end = now_ms() + DEADLINE * 1000;
	struct dm_call call;
	const char *wrong;
	int ret;

	while (!(ret = look_at_status(words, &call, &wrong)) && wrong) {
		if (now_ms() > end)
			die("expected %s in the status after %u s, %s", wrong, DEADLINE,
			    call.table.params);
		nap();
	}
	return ret;
}

/*
 * Prefetches
 */

static struct {
	pthread_t thread;
	sem_t begun, ended;
	const char *name;
	int result;
} prefetch;

/* Returns: 1 while it is under way, then 0 or -errno. */
static int prefetch_result(const char *name)
{
	struct dm_call call;
	int ret = dm_status(name, &call);

	if (ret)
		return ret;
	if (strstr(call.table.params, " running:"))
		return 1;
	if (strstr(call.table.params, " failed:"))
		return -EIO;
	return strstr(call.table.params, " full:") ? -ENOMEM : 0;
}

/* A thread of its own, since the faults of a round are not meant for who only looks. */
static void *watch_prefetches(void *arg)
{
	while (!sem_wait(&prefetch.begun)) {
		while ((prefetch.result = prefetch_result(prefetch.name)) == 1)
			nap();
		sem_post(&prefetch.ended);
	}
	return arg;
}

static int do_prefetch(char **words)
{
	uint64_t end = now_ms() + DEADLINE * 1000;
	char text[100];
	int ret;

	if (!prefetch.name && (sem_init(&prefetch.begun, 0, 0) ||
			       sem_init(&prefetch.ended, 0, 0) ||
			       pthread_create(&prefetch.thread, NULL, watch_prefetches, NULL)))
		die("cannot start a thread");
	prefetch.name = words[0];
	snprintf(text, sizeof(text), "prefetch %s %s", words[1], words[2]);
	/* reads of one that has failed may still be under way */
	while ((ret = dm_message(words[0], text)) == -EBUSY && now_ms() < end)
		nap();
	if (ret)
		return ret;
	sem_post(&prefetch.begun);
	while (sem_wait(&prefetch.ended))
		if (errno != EINTR)
			die("sem_wait: %s", strerror(errno));
	return prefetch.result;
}

static int command(char *text);
static int execute(char *text, int *want);

static void do_timed(unsigned int count, char **words)
{
	uint64_t best = UINT64_MAX, took;
	struct timespec from, to;
	char text[1024];

	while (count--) {
		join_words(text, sizeof(text), words);
		clock_gettime(CLOCK_MONOTONIC, &from);
		command(text);
		clock_gettime(CLOCK_MONOTONIC, &to);
		took = (to.tv_sec - from.tv_sec) * 1000000ULL + to.tv_nsec / 1000 -
		       from.tv_nsec / 1000;
		if (took < best)
			best = took;
	}
	printf("%" PRIu64 "\n", best);
}

static void do_sum(void)
{
	uint64_t offset, n, i, sum = 0;
	uint64_t *buf = get_buffer(CHUNK);
	int ret;

	for (offset = 0; offset < bytes; offset += n) {
		n = bytes - offset < CHUNK ? bytes - offset : CHUNK;
		ret = transfer(false, &(struct iovec){ buf, n }, 1, offset, 0);
		if (ret)
			die("reading at %" PRIu64 ": %s", offset, strerror(-ret));
		for (i = 0; i < n / sizeof(*buf); i++)
			sum = (sum << 7 | sum >> 57) * 0x9e3779b97f4a7c15ULL + buf[i];
	}
	printf("%016" PRIx64 "\n", sum);
	put_buffer(buf);
}

static void do_model(uint64_t base_bytes)
{
	free(model);
	model = calloc(bytes / SECTOR, sizeof(*model));
	if (!model)
		die("out of memory");
	model_set(0, base_bytes < bytes ? base_bytes : bytes, TAG_BASE);
}

/*
 * Every start and length in a run of three blocks, over all 27 mixtures of
 * block states, each on blocks of its own. Neighbours on both sides show a
 * write that spills over.
 */
static void do_sweep(void)
{
	const unsigned int units = 3 * BLOCK / unit;
	unsigned int mix, from, len, i, m;
	uint64_t at = 0;
	uint32_t tag = TAG_FIRST + 'A';

	for (mix = 0; mix < 27; mix++) {
		for (from = 0; from < units; from++) {
			for (len = 1; from + len <= units; len++) {
				uint64_t offset = at + (uint64_t)from * unit;

				if (at + 3 * BLOCK > bytes)
					die("too small for a sweep");
				for (i = 0, m = mix; i < 3; i++, m /= 3) {
					uint64_t block = at + (uint64_t)i * BLOCK;

					if ((m % 3 == 1 && do_write(block, BLOCK, tag, 0)) ||
					    (m % 3 == 2 && do_clear("discard", block, BLOCK)))
						die("sweep at %" PRIu64 ": I/O error", block);
				}
				if (do_check(offset, (uint64_t)len * unit, tag_model, NULL, 0,
					     "sweep, before the write") ||
				    do_write(offset, (uint64_t)len * unit, tag + 1, 0) ||
				    do_check(at, 3 * BLOCK, tag_model, NULL, 0,
					     "sweep, after the write"))
					die("sweep at %" PRIu64 ": I/O error", offset);
				at += 3 * BLOCK;
			}
		}
	}
}

/* Splits @len bytes at @buf into up to four pieces of whole units. */
static int random_vector(struct iovec *iov, char *buf, uint64_t len)
{
	int count = 0;

	while (count < 3 && len > unit && random() % 2) {
		uint64_t n = (1 + random() % (len / unit - 1)) * unit;

		iov[count++] = (struct iovec){ buf, n };
		buf += n;
		len -= n;
	}
	iov[count++] = (struct iovec){ buf, len };
	return count;
}

static uint64_t random_length(void)
{
	switch (random() % 16) {
	case 0:
		return 1 + random() % (BIGGEST / unit);
	case 1 ... 4:
		return 1 + random() % (65536 / unit);
	case 5 ... 6:
		return BLOCK / unit;
	default:
		return 1 + random() % (4 * BLOCK / unit);
	}
}

static void do_random(unsigned int seed, unsigned int count)
{
	static const char *const clears[] = { "discard", "zeroout", "punch", "zerorange" };
	char *memory = get_buffer(BIGGEST + BLOCK);
	const uint64_t units = bytes / unit;
	struct iovec iov[4];
	unsigned int i;

	srandom(seed);
	for (i = 0; i < count; i++) {
		uint64_t len = random_length(), from, offset;
		/* direct I/O wants sectors, and the kernel gets odd pieces of pages */
		char *buf = memory + random() % (BLOCK / SECTOR) * SECTOR;
		unsigned int kind = random() % 8;
		uint32_t tag = TAG_FIRST + 256 + i;
		int ret;

		if (len > units)
			len = units;
		from = random() % (units - len + 1);
		if (random() % 4 == 0)
			from = from * unit / BLOCK * BLOCK / unit;
		offset = from * unit;
		len *= unit;
		if (kind == 0) {
			ret = do_clear(clears[random() % 4], offset, len);
		} else if (kind <= 3) {
			memset(buf, 0x5a, len);
			ret = transfer(false, iov, random_vector(iov, buf, len), offset, 0);
			if (!ret)
				compare(buf, offset, len, 0, tag_model, NULL, "random read");
		} else {
			stamp_range(buf, offset / SECTOR, len / SECTOR, tag);
			ret = transfer(true, iov, random_vector(iov, buf, len), offset, 0);
			model_set(offset, len, tag);
		}
		if (ret)
			die("random operation %u of seed %u: %s", i, seed, strerror(-ret));
	}
	put_buffer(memory);
}

static void *job_run(void *arg)
{
	struct job *job = arg;
	char *copy = strdup(job->text);
	int ret = copy ? command(copy) : -ENOMEM;

	if (ret)
		die("%s: %s", job->text, strerror(-ret));
	free(copy);
	__atomic_store_n(&job->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void do_bg(char *text)
{
	struct job *job = &jobs[nr_jobs];

	if (nr_jobs == JOBS)
		die("too many commands in the background");
	*job = (struct job){ .text = text };
	if (pthread_create(&job->thread, NULL, job_run, job))
		die("cannot start a thread");
	nr_jobs++;
}

static void do_join(void)
{
	struct timespec ts;
	unsigned int i;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += DEADLINE;
	for (i = 0; i < nr_jobs; i++)
		if (pthread_timedjoin_np(jobs[i].thread, NULL, &ts))
			die("%s: not ended after %u s", jobs[i].text, DEADLINE);
	nr_jobs = 0;
}

/* Takes note of the requests that have ended; waits for one if it should. */
static void reap(bool wait)
{
	struct timespec ts = { .tv_sec = wait ? DEADLINE : 0 };
	struct io_event events[JOBS];
	int n = syscall(SYS_io_getevents, aio, wait, JOBS, events, &ts), i;

	if (n < 0)
		die("io_getevents: %s", strerror(errno));
	if (wait && !n)
		die("%s: not ended after %u s", requests[0].text, DEADLINE);
	for (i = 0; i < n; i++) {
		struct request *r = &requests[events[i].data];

		if (events[i].res != (r->want ? r->want : (int64_t)r->iocb.aio_nbytes))
			die("%s: %s", r->text, events[i].res < 0 ?
			    strerror(-(int)events[i].res) : "did not fail");
		put_buffer(r->buf);
		r->done = true;
	}
}

static unsigned int unfinished(void)
{
	unsigned int i, n = 0;

	if (nr_requests)
		reap(false);
	for (i = 0; i < nr_requests; i++)
		n += !requests[i].done;
	for (i = 0; i < nr_jobs; i++)
		n += !__atomic_load_n(&jobs[i].done, __ATOMIC_ACQUIRE);
	return n;
}

static void do_reap(void)
{
	unsigned int i;

	for (i = 0; i < nr_requests; i++)
		while (!requests[i].done)
			reap(true);
	nr_requests = 0;
}

static int do_submit(uint64_t offset, uint64_t len, uint32_t tag, int flags, int want,
		     const char *text)
{
	struct request *r = &requests[nr_requests];
	struct iocb *iocb = &r->iocb;

	if (nr_requests == JOBS || len > BIGGEST)
		die("%s: too many requests, or too long", text);
	if (!aio && syscall(SYS_io_setup, JOBS, &aio))
		die("io_setup: %s", strerror(errno));
	*r = (struct request){ .text = strdup(text), .buf = get_buffer(len), .want = want };
	stamp_range(r->buf, offset / SECTOR, len / SECTOR, tag);
	r->iocb = (struct iocb){
		.aio_data = nr_requests++, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_fildes = fd,
		.aio_buf = (uintptr_t)r->buf, .aio_nbytes = len, .aio_offset = offset,
		.aio_rw_flags = flags,
	};
	/* a submission that blocks would end here, or at the deadline of the test */
	alarm(DEADLINE);
	if (syscall(SYS_io_submit, aio, 1, &iocb) != 1)
		die("%s: io_submit: %s", text, strerror(errno));
	alarm(0);
	return want;
}

static void do_pending(unsigned int want)
{
	unsigned int n = unfinished();

	if (n != want)
		die("%u commands have not ended, expected %u", n, want);
}

/*
 * Whether a thread of ours sleeps in a kernel function whose name contains
 * @where. User-Mode Linux would not know it from wchan.
 */
static bool asleep(const char *where)
{
	DIR *dir = opendir("/proc/self/task");
	struct dirent *entry;
	bool found = false;

	while (dir && !found && (entry = readdir(dir))) {
		char name[300], line[200];
		FILE *f;

		snprintf(name, sizeof(name), "/proc/self/task/%s/stack", entry->d_name);
		f = fopen(name, "r");
		if (!f)
			continue;
		while (!found && fgets(line, sizeof(line), f))
			found = strstr(line, where);
		fclose(f);
	}
	if (dir)
		closedir(dir);
	return found;
}

static void do_asleep(const char *where)
{
	uint64_t end = now_ms() + DEADLINE * 1000;

	while (!asleep(where)) {
		if (now_ms() > end)
			die("no thread sleeps in %s after %u s", where, DEADLINE);
		nap();
	}
}

/* Runs the commands that move data. Returns: 0, -errno, or 1 if it is none of them. */
static int data_command(char **words, int count, int flags, int want, const char *text)
{
	uint64_t offset, len;
	uint32_t tag;

	if (!strcmp(words[0], "submit") && count > 1) {
		words++;
		count--;
		if (!strcmp(words[0], "nowait") && count > 1) {
			flags |= RWF_NOWAIT;
			words++;
			count--;
		}
		if (count != 4 || strcmp(words[0], "write"))
			return 1;
		offset = parse_bytes(words[1], 0);
		return do_submit(offset, parse_bytes(words[2], offset), parse_tag(words[3][0]),
				 flags, want, text);
	}

	if (!strcmp(words[0], "is") && count == 3) {
		offset = parse_bytes(words[1], 0);
		return do_check(offset, strlen(words[2]) * SECTOR, tag_string, words[2], flags,
				text);
	}
	if (count < 3)
		return 1;
	if (!strcmp(words[0], "discard") || !strcmp(words[0], "zeroout") ||
	    !strcmp(words[0], "punch") || !strcmp(words[0], "zerorange")) {
		offset = parse_bytes(words[1], 0);
		return do_clear(words[0], offset, parse_bytes(words[2], offset));
	}
	if (count != 4)
		return 1;
	if (!strcmp(words[0], "write") || !strcmp(words[0], "fua") ||
	    !strcmp(words[0], "check")) {
		offset = parse_bytes(words[1], 0);
		len = parse_bytes(words[2], offset);
		tag = parse_tag(words[3][0]);
		if (words[0][0] == 'c')
			return do_check(offset, len, tag_one, &tag, flags, text);
		return do_write(offset, len, tag, flags | (words[0][0] == 'f' ? RWF_DSYNC : 0));
	}
	return 1;
}

/*
 * Faults
 */

#define ROUND_COMMANDS 16
#define TASKS 256
#define POINTS 8		/* of each kind, from which on all allocations fail */
#define MOST_FAULTS 1000000000	/* more than there are in a round */

static const char *const kinds[] = { "failslab", "fail_page_alloc" };

static struct commands {
	char *texts[ROUND_COMMANDS];
	unsigned int count;
} before, failed, after;

/* A file in /proc of each task that works for us; our own is the last. */
static int tasks[TASKS];
static unsigned int nr_tasks;

static void remember(struct commands *list, char **words)
{
	char text[1024];

	if (list->count == ROUND_COMMANDS)
		die("too many commands");
	join_words(text, sizeof(text), words);
	list->texts[list->count++] = strdup(text);
}

static void play(struct commands *list)
{
	char text[1024];
	unsigned int i;

	for (i = 0; i < list->count; i++) {
		snprintf(text, sizeof(text), "%s", list->texts[i]);
		command(text);
	}
}

static void forget(struct commands *list)
{
	while (list->count)
		free(list->texts[--list->count]);
}

/*
 * After a failed write or discard: each block is as before or as wanted. The
 * model says afterwards which.
 */
static void settle(char **words)
{
	uint64_t offset, end, at, next, i;
	uint32_t tag = TAG_ZERO;
	char *buf;

	if (!strcmp(words[0], "write") || !strcmp(words[0], "fua"))
		tag = parse_tag(words[3][0]);
	else if (strcmp(words[0], "discard") && strcmp(words[0], "zeroout") &&
		 strcmp(words[0], "punch") && strcmp(words[0], "zerorange"))
		return;

	buf = get_buffer(BLOCK);
	offset = parse_bytes(words[1], 0);
	end = offset + parse_bytes(words[2], offset);
	for (at = offset; at < end; at = next) {
		next = (at / BLOCK + 1) * BLOCK;
		if (next > end)
			next = end;
		if (transfer(false, &(struct iovec){ buf, next - at }, 1, at, 0))
			die("cannot read at %" PRIu64, at);
		for (i = 0; i < (next - at) / SECTOR; i++)
			if (stamp_tag(buf + i * SECTOR, at / SECTOR + i) != tag)
				break;
		if (i == (next - at) / SECTOR)
			model_set(at, next - at, tag);
		else
			compare(buf, at, next - at, 0, tag_model, NULL, "after a failure");
	}
	put_buffer(buf);
}

/* May a fault end this command so? Where there is no model all may. */
static bool from_fault(int ret, const char *command)
{
	switch (ret) {
	case -ENOMEM:
	case -EIO:
	case -ENOSPC:
		return true;
	case -ENXIO:	/* device-mapper: no memory for a device */
	case -ENODEV:	/* none to find one; 6.1 cannot tell */
	case -EINVAL:	/* none for its queue */
		return !strcmp(command, "create");
	default:
		return false;
	}
}

/* Returns: 0 or -errno. */
static int attempt(char **words)
{
	char text[1024];
	int want, ret;

	join_words(text, sizeof(text), words);
	ret = execute(text, &want);
	if (ret && model && !from_fault(ret, words[0]))
		die("%s: %s", words[0], strerror(-ret));
	return ret;
}

/* Those who work for us are the kernel's workers; they come and go. */
static void open_tasks(const char *name)
{
	DIR *dir = opendir("/proc");
	struct dirent *entry;
	char file[300], comm[64];
	FILE *f;

	while (dir && (entry = readdir(dir)) && nr_tasks < TASKS - 1) {
		snprintf(file, sizeof(file), "/proc/%s/comm", entry->d_name);
		f = atoi(entry->d_name) ? fopen(file, "r") : NULL;
		if (!f)
			continue;
		if (fgets(comm, sizeof(comm), f) &&
		    (!strncmp(comm, "kworker", 7) || !strncmp(comm, "nbdcow", 6))) {
			snprintf(file, sizeof(file), "/proc/%s/%s", entry->d_name, name);
			tasks[nr_tasks] = open(file, O_RDWR | O_CLOEXEC);
			if (tasks[nr_tasks] >= 0)
				nr_tasks++;
		}
		fclose(f);
	}
	if (dir)
		closedir(dir);
	snprintf(file, sizeof(file), "/proc/self/%s", name);
	tasks[nr_tasks] = open(file, O_RDWR | O_CLOEXEC);
	if (tasks[nr_tasks++] < 0)
		die("%s: %s", file, strerror(errno));
}

static void tell_tasks(unsigned int value)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", value);
	unsigned int i;

	/* a worker may have ended */
	for (i = 0; i < nr_tasks; i++)
		if (pwrite(tasks[i], text, len, 0) != len && i == nr_tasks - 1)
			die("cannot write %s: %s", text, strerror(errno));
}

static void close_tasks(void)
{
	while (nr_tasks)
		close(tasks[--nr_tasks]);
}

/* How many faults there were, by what makes them. */
static struct {
	unsigned int nth;
	long kind[2];
} hits;

/* The @nth allocation or request of each task fails. Returns: whether there was one. */
static bool fail_nth(unsigned int nth, char **words, int *ret)
{
	bool hit = false;
	unsigned int i;

	open_tasks("fail-nth");
	tell_tasks(nth);
	*ret = attempt(words);
	for (i = nr_tasks; i-- > 0;) {
		char text[16] = "";

		if (pread(tasks[i], text, sizeof(text) - 1, 0) > 0 && !atoi(text))
			hit = true;
		if (pwrite(tasks[i], "0", 1, 0) != 1 && i == nr_tasks - 1)
			die("cannot end the faults: %s", strerror(errno));
	}
	close_tasks();
	hits.nth += hit;
	return hit;
}

static int open_knob(const char *kind, const char *name)
{
	char file[100];
	int knob;

	snprintf(file, sizeof(file), "/sys/kernel/debug/%s/%s", kind, name);
	knob = open(file, O_RDWR | O_CLOEXEC);
	if (knob < 0)
		die("%s: %s", file, strerror(errno));
	return knob;
}

static void set_knob(int knob, long value)
{
	char text[24];
	int len = snprintf(text, sizeof(text), "%ld", value);

	if (write(knob, text, len) != len)
		die("cannot set a fault to %s: %s", text, strerror(errno));
}

static long get_knob(int knob)
{
	char text[24] = "";

	if (read(knob, text, sizeof(text) - 1) <= 0)
		die("cannot read what is left of a fault: %s", strerror(errno));
	return atol(text);
}

/*
 * All allocations of a kind fail once there were so many; what is counted is
 * bytes for slabs, pages for pages. Returns: how much there was.
 */
static long fail_from(unsigned int kind, long from, char **words, int *ret)
{
	int space = open_knob(kinds[kind], "space"), times = open_knob(kinds[kind], "times");
	long left;

	set_knob(space, from + 1);
	open_tasks("make-it-fail");
	tell_tasks(1);
	set_knob(times, MOST_FAULTS);
	*ret = attempt(words);
	hits.kind[kind] += MOST_FAULTS - get_knob(times);
	set_knob(times, 0);
	tell_tasks(0);
	close_tasks();
	left = get_knob(space);
	set_knob(space, 0);
	close(space);
	close(times);
	return from + 1 - left;
}

/* What follows an attempt. Returns: whether it had failed. */
static bool end_round(char **words, int ret)
{
	if (ret) {
		play(&failed);
		if (model) {
			settle(words);
			if (do_check(0, bytes, tag_model, NULL, 0, "device after a failure"))
				die("cannot read the device");
		}
		if (attempt(words))
			die("%s does not work any more", words[0]);
	}
	play(&after);
	if (model && do_check(0, bytes, tag_model, NULL, 0, "device"))
		die("cannot read the device");
	return ret;
}

static void do_faults(char **words)
{
	unsigned int nth, misses = 0, rounds = 0, failures = 0, kind;
	char text[200];
	long all, from;
	int ret;

	/* no new pages for buffers while allocations fail */
	mallopt(M_MMAP_THRESHOLD, 1 << 30);
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	memset(&hits, 0, sizeof(hits));
	join_words(text, sizeof(text), words);
	play(&before);
	if (attempt(words))
		die("%s: fails anyway", text);
	end_round(words, 0);

	/* a worker that is new has not been told */
	for (nth = 1; misses < 3; nth++) {
		snprintf(round_text, sizeof(round_text), "fault %u: ", nth);
		play(&before);
		misses = fail_nth(nth, words, &ret) ? 0 : misses + 1;
		rounds++;
		failures += end_round(words, ret);
	}
	for (kind = 0; kind < 2; kind++) {
		play(&before);
		all = fail_from(kind, 1L << 30, words, &ret);
		end_round(words, ret);
		for (from = 0; from < all; from += all / POINTS + 1) {
			snprintf(round_text, sizeof(round_text), "%s from %ld on: ", kinds[kind],
				 from);
			play(&before);
			fail_from(kind, from, words, &ret);
			rounds++;
			failures += end_round(words, ret);
		}
	}
	round_text[0] = '\0';
	/* whatever is asked of the kernel takes some memory from slabs */
	if (!hits.nth || !hits.kind[0])
		die("%s: %u and %ld faults, so it shows nothing", text, hits.nth, hits.kind[0]);
	forget(&before);
	forget(&failed);
	forget(&after);
	printf("%s: %u rounds with %u, %ld and %ld faults, %u failures\n", text, rounds, hits.nth,
	       hits.kind[0], hits.kind[1], failures);
}

/* Returns: 0 or -errno; @want is set to what it should be. */
static int execute(char *text, int *want)
{
	char *words[WORDS + 1] = { NULL }, *save, *label = strdup(text);
	int count = 0, ret = 0, flags = 0, first = 0;
	char *w;

	*want = 0;
	for (w = strtok_r(text, " ", &save); w && count < WORDS; w = strtok_r(NULL, " ", &save))
		words[count++] = w;
	if (w)
		die("too many words: %s", label);
	if (count > 2 && !strcmp(words[0], "fails")) {
		*want = -parse_errno(words[1]);
		first = 2;
	}
	if (count > first + 1 && !strcmp(words[first], "nowait")) {
		flags = RWF_NOWAIT;
		first++;
	}
	if (count <= first)
		die("empty command");
	count -= first;

	if (!strcmp(words[first], "run"))
		do_run(words + first + 1);
	else if (!strcmp(words[first], "echo") && count == 3)
		do_echo(words[first + 1], words[first + 2]);
	else if (!strcmp(words[first], "flush"))
		ret = do_flush(false);
	else if (!strcmp(words[first], "drop"))
		ret = do_flush(true);
	else if (!strcmp(words[first], "join"))
		do_join();
	else if (!strcmp(words[first], "sum"))
		do_sum();
	else if (!strcmp(words[first], "sweep") && model)
		do_sweep();
	else if (!strcmp(words[first], "verify") && model)
		ret = do_check(0, bytes, tag_model, NULL, 0, label);
	else if (!strcmp(words[first], "pending") && count == 2)
		do_pending(atoi(words[first + 1]));
	else if (!strcmp(words[first], "model") && count == 2)
		do_model(parse_bytes(words[first + 1], 0));
	else if (!strcmp(words[first], "inflight") && count == 3)
		do_inflight(words[first + 1], atoi(words[first + 2]));
	else if (!strcmp(words[first], "timed") && count > 2)
		do_timed(atoi(words[first + 1]), words + first + 2);
	else if (!strcmp(words[first], "create") && count > 3)
		ret = do_create(words + first + 1);
	else if (!strcmp(words[first], "reload") && count > 3)
		ret = do_reload(words + first + 1);
	else if (!strcmp(words[first], "remove") && count == 2)
		ret = dm_remove(words[first + 1]);
	else if (!strcmp(words[first], "absent") && count == 2)
		do_absent(words[first + 1]);
	else if (!strcmp(words[first], "open") && count == 2)
		do_open(words[first + 1]);
	else if (!strcmp(words[first], "before") && count > 1)
		remember(&before, words + first + 1);
	else if (!strcmp(words[first], "failed") && count > 1)
		remember(&failed, words + first + 1);
	else if (!strcmp(words[first], "after") && count > 1)
		remember(&after, words + first + 1);
	else if (!strcmp(words[first], "faults") && count > 1)
		do_faults(words + first + 1);
	else if (!strcmp(words[first], "try") && count > 1)
		attempt(words + first + 1);
	else if (!strcmp(words[first], "load") && count > 3)
		ret = do_load(words + first + 1);
	else if (!strcmp(words[first], "reject") && count > 4)
		do_reject(atoi(words[first + 1]), words + first + 2);
	else if (!strcmp(words[first], "message") && count > 2)
		ret = do_message(words + first + 1);
	else if (!strcmp(words[first], "status") && count > 2)
		ret = do_status(words + first + 1);
	else if (!strcmp(words[first], "await") && count > 2)
		ret = do_await(words + first + 1);
	else if (!strcmp(words[first], "prefetch") && count == 4)
		ret = do_prefetch(words + first + 1);
	else if (!strcmp(words[first], "suspend") && count == 2)
		ret = dm_suspend(words[first + 1], 0);
	else if (!strcmp(words[first], "resume") && count == 2)
		ret = dm_resume(words[first + 1]);
	else if (!strcmp(words[first], "reap"))
		do_reap();
	else if (!strcmp(words[first], "asleep") && count == 2)
		do_asleep(words[first + 1]);
	else if (!strcmp(words[first], "held") && count == 3)
		do_held(words[first + 1], atoi(words[first + 2]));
	else if (!strcmp(words[first], "random") && count == 3 && model)
		do_random(atoi(words[first + 1]), atoi(words[first + 2]));
	else if (!strcmp(words[first], "shift") && count == 2)
		shift = strtoul(words[first + 1], NULL, 0) % BLOCK;
	else if (!strcmp(words[first], "size") && count == 2) {
		if (bytes != parse_bytes(words[first + 1], 0))
			die("%s: it has %" PRIu64 " bytes", label, bytes);
	} else {
		ret = data_command(words + first, count, flags, *want, label);
		if (ret == 1)
			die("%s: no such command", label);
	}
	free(label);
	return ret;
}

static int command(char *text)
{
	char *label = strdup(text);
	int want, ret = execute(text, &want);

	if (ret != want)
		die("%s: %s", label, ret ? strerror(-ret) : "did not fail");
	free(label);
	return 0;
}

int main(int argc, char **argv)
{
	int i;

	if (argc > 1 && !strcmp(argv[1], "-b")) {
		buffered = true;
		argv++;
		argc--;
	}
	if (argc < 3) {
		usage();
		return 2;
	}
	main_path = argv[1];
	open_device(main_path);
	for (i = 2; i < argc; i++) {
		if (!strncmp(argv[i], "bg ", 3))
			do_bg(argv[i] + 3);
		else
			command(argv[i]);
	}
	do_reap();
	do_join();
	return 0;
}
