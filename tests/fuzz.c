// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz - random operations on a device of nbdcow, against a model that knows
 * what each read may see
 *
 * The run is made of rounds, each with a device, a seed and a mixture of
 * operations of its own: direct I/O (vectors, odd alignments, with and without
 * RWF_NOWAIT), io_uring, buffered I/O, discards, zeroing, flushes; and from one
 * more thread suspend, resume, reset, limits, and tables with another limit,
 * another base or another size. There may be views, which any thread reads.
 *
 * Buffered I/O has a part of the device for itself, and a model of its own,
 * with the values that the page cache should have.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <getopt.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "dmctl.h"
#include "fuzz.h"

#define HANG 120		/* seconds without any operation that count as a hang */

/* Of the device; the first ends within a block, and all are longer than the base. */
static const uint64_t sizes[] = { MIB(64) + KIB(384) + 5, MIB(96), LARGEST };

const char *const features[FEATURES] = {
	"buffered", "control", "limits", "nowait", "uring", "big", "zeroes", "vm",
	"cache", "views",
};

struct round cfg;
struct options opt = { .seconds = 60, .threads = 4 };
uint64_t base_sectors;
time_t deadline;
volatile bool stopping;
bool quiet, broken;
static uint32_t next_tag;
char device[64];		/* its path */
static int fd = -1;		/* the device, O_DIRECT */
static int cached_fd = -1;	/* the same without */
static char total_limit[64];	/* before */
static uint64_t longest;	/* sectors that a table of the device had so far */

/*
 * Buffered I/O: read-locked by who does it, write-locked by who changes the
 * device behind the back of the page cache.
 */
static pthread_rwlock_t cache_lock = PTHREAD_RWLOCK_INITIALIZER;

/*
 * Chance
 */

uint64_t next_random(struct rng *rng)
{
	uint64_t z = (rng->state += 0x9e3779b97f4a7c15ULL);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

uint64_t below(struct rng *rng, uint64_t n)
{
	return next_random(rng) % n;
}

bool percent(struct rng *rng, unsigned int n)
{
	return below(rng, 100) < n;
}

/*
 * Telling
 */

void print_replay(void)
{
	const char *comma = " --without ";
	unsigned int i;

	printf("# again: fuzz --seed %" PRIu64 " --threads %u %s", cfg.seed, opt.threads,
	       opt.threads > 1 ? "--repeat" : "--rounds 1");
	if (opt.ops)
		printf(" --ops %u", opt.ops);
	for (i = 0; i < FEATURES; i++) {
		if (opt.without & 1U << i) {
			printf("%s%s", comma, features[i]);
			comma = ",";
		}
	}
	if (opt.tmpfs)
		printf(" --tmpfs %s", opt.tmpfs);
	if (opt.cgroup)
		printf(" --cgroup %s", opt.cgroup);
	for (i = 0; i < opt.nr_bases; i++)
		printf(" %s", opt.bases[i]);
	printf("\n");
}

/* Leaves stdout locked. */
static void tell(const char *fmt, va_list args)
{
	flockfile(stdout);
	printf("# round %u: ", cfg.number);
	vprintf(fmt, args);
	printf("\n");
}

void die(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	tell(fmt, args);
	va_end(args);
	print_replay();
	fflush(stdout);
	_exit(1);
}

/*
 * The round has failed; it ends soon. Returns: whether that is to be told.
 */
bool news(void)
{
	bool first = !__atomic_exchange_n(&broken, true, __ATOMIC_ACQ_REL);

	stopping = true;
	return first && !quiet;
}

void wrong(const char *fmt, ...)
{
	va_list args;

	if (!news())
		return;
	va_start(args, fmt);
	tell(fmt, args);
	va_end(args);
	funlockfile(stdout);
}

/*
 * Operations
 */

static bool with(unsigned int feature)
{
	return !(opt.without & 1U << feature);
}

static void prepare(struct op *op, struct rng *rng)
{
	uint64_t left = op->count * SECTOR;
	char *at;

	if (op->kind != READ && op->kind != WRITE)
		return;
	if (posix_memalign((void **)&op->memory, 4096, left + 4096))
		die("out of memory");
	op->buffer = at = op->memory + op->shift;
	if (op->kind == WRITE)
		stamp_range(at, op->sector, op->count, op->tag);
	else
		memset(at, 0x5a, left);
	op->iovs = 0;
	while (op->flags & VECTOR && op->iovs < 3 && left > SECTOR) {
		uint64_t n = (1 + below(rng, left / SECTOR - 1)) * SECTOR;

		op->iov[op->iovs++] = (struct iovec){ at, n };
		at += n;
		left -= n;
	}
	op->iov[op->iovs++] = (struct iovec){ at, left };
}

static int rw_flags(const struct op *op)
{
	return (op->flags & NOWAIT ? RWF_NOWAIT : 0) | (op->flags & DSYNC ? RWF_DSYNC : 0);
}

static int falloc_mode(enum kind kind)
{
	return FALLOC_FL_KEEP_SIZE |
	       (kind == PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
}

/* The sectors of blocks that a write or zeroing touches lie all in one. */
static bool single_block(const struct op *op)
{
	return op->sector / SECTORS_PER_BLOCK ==
	       (op->sector + op->count - 1) / SECTORS_PER_BLOCK;
}

/* Judges how the operation ended. Returns: whether that was right. */
static bool finish(struct op *op, int result)
{
	uint64_t limited;
	bool right;

	if (op->kind == READ || op->kind == WRITE) {
		right = result > 0 || (result == -EAGAIN && op->flags & NOWAIT);
		/* a short count is right only where something stopped it */
		if (result > 0 && (uint64_t)result < op->count * SECTOR)
			right = op->flags & NOWAIT || op->kind == WRITE;
	} else {
		/* fallocate() says so while a table is being exchanged */
		right = !result || (result == -EOPNOTSUPP && op->kind != DISCARD);
	}
	if (!right && result == -ENOSPC && op->kind != READ && op->kind != DISCARD) {
		model_lock();
		limited = limited_until;
		model_unlock();
		right = op->start < limited;
	}
	/* io_uring tries all with RWF_NOWAIT: a base that does not know it may be new */
	if (result == -EOPNOTSUPP && op->flags & URING && !cfg.nowait)
		right = true;
	/* the page cache tells anybody that somebody's buffered write was lost */
	if ((result == -EIO || result == -ENOSPC) && cfg.buffered && cfg.limits)
		right = true;
	if (!right && news()) {
		flockfile(stdout);
		printf("# round %u, thread %u: ", cfg.number, op->thread);
		print_op(op);
		printf(": %s\n", result < 0 ? strerror(-result) : "too short");
		funlockfile(stdout);
	}
	if (result < 0)
		/* RWF_DSYNC writes first, and may then tell of somebody's lost write */
		right &= op_end(op, result, single_block(op) && op->kind == WRITE &&
				!(op->flags & DSYNC) ? NOT_DONE : MAYBE);
	else if (op->kind == WRITE && (uint64_t)result < op->count * SECTOR)
		right &= op_end(op, result, MAYBE);
	else
		right &= op_end(op, result, DONE);
	free(op->memory);
	op->memory = NULL;
	return right;
}

/* Returns: whether the operation and what it saw were right. */
bool run_sync(struct op *op, struct rng *rng)
{
	uint64_t range[2] = { op->sector * SECTOR, op->count * SECTOR };
	ssize_t ret;

	prepare(op, rng);
	if (op->kind == LOOK)
		return view_look(op);
	op_begin(op);
	switch (op->kind) {
	case READ:
		ret = preadv2(fd, op->iov, op->iovs, range[0], rw_flags(op));
		break;
	case WRITE:
		ret = pwritev2(fd, op->iov, op->iovs, range[0], rw_flags(op));
		break;
	case DISCARD:
		ret = ioctl(fd, BLKDISCARD, range);
		break;
	case ZEROOUT:
		ret = ioctl(fd, BLKZEROOUT, range);
		break;
	case PUNCH:
	case ZERORANGE:
		ret = fallocate(fd, falloc_mode(op->kind), range[0], range[1]);
		break;
	default:
		ret = fsync(fd);
	}
	return finish(op, ret < 0 ? -errno : ret);
}

static uint32_t new_tag(void)
{
	return TAG_FIRST + __atomic_fetch_add(&next_tag, 1, __ATOMIC_RELAXED) %
	       (STAMP_TAGS - TAG_FIRST);
}

/* Moves what changes data to sectors of the thread's own, if the window has any near. */
static void to_own_stripe(struct op *op)
{
	const struct window *w = &windows[op->window];
	uint64_t turn = (uint64_t)cfg.stripe * opt.threads, end = w->first + w->sectors, at;

	if (op->kind == READ || op->kind >= FLUSH)
		return;
	at = op->sector / turn * turn + (uint64_t)op->thread * cfg.stripe;
	if (at < w->first)
		at += turn;
	if (end > cfg.sectors)
		end = cfg.sectors;
	op->sector = at + op->sector % cfg.stripe;
	if (op->count > at + cfg.stripe - op->sector)
		op->count = at + cfg.stripe - op->sector;
	if (op->sector + op->count > end)
		op->kind = FLUSH;
}

/* An operation on data, in one of the windows that are there. */
struct op random_op(struct rng *rng, unsigned int thread)
{
	struct op op = { .thread = thread };
	unsigned int dice = below(rng, 100), w = below(rng, 5);
	uint64_t room, len, max = cfg.big && percent(rng, 5) ? LONGEST : 40;

	op.window = w < 2 ? 0 : w < 4 ? 1 : 2;
	if (windows[op.window].first >= cfg.sectors)
		op.window = 0;
	op.sector = windows[op.window].first;
	room = windows[op.window].sectors;
	if (op.sector + room > cfg.sectors)
		room = cfg.sectors - op.sector;
	if (percent(rng, cfg.percent_hot) && cfg.hot < room) {
		/* hot is the middle of a window, where leaf and base end, or its end */
		op.sector += percent(rng, 80) ? (windows[op.window].sectors - cfg.hot) / 2 / 8 * 8 :
			     (room - cfg.hot) / 8 * 8;
		room = windows[op.window].first + room - op.sector;
		if (room > cfg.hot + 7)
			room = cfg.hot;
	}

	op.kind = dice < 35 ? READ : dice < 80 ? WRITE : DISCARD + (dice - 80) / 5;
	if (op.kind > ZERORANGE)
		op.kind = FLUSH;
	if (op.kind > WRITE && !with(ZEROES))
		op.kind = dice % 2 ? READ : WRITE;
	if (cfg.percent_views && percent(rng, 8))
		op.kind = LOOK;
	op.view = below(rng, VIEWS);
	if (percent(rng, 30))
		len = SECTORS_PER_BLOCK * (1 + below(rng, max / SECTORS_PER_BLOCK));
	else if (percent(rng, 50))
		len = 1 + below(rng, 8);
	else
		len = 1 + below(rng, max);
	if (len > room)
		len = room;
	op.count = len;
	op.sector += below(rng, room - len + 1);
	if (percent(rng, 40))
		op.sector = op.sector / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
	if (cfg.stripe)
		to_own_stripe(&op);

	op.shift = percent(rng, 50) ? 0 : below(rng, 8) * SECTOR;
	op.flags = percent(rng, 20) ? VECTOR : 0;
	if (op.kind == WRITE && percent(rng, 5))
		op.flags |= DSYNC;
	if (cfg.nowait && op.kind <= WRITE && percent(rng, 30))
		op.flags |= NOWAIT;
	if (opt.threads > 1 && with(URINGS) && percent(rng, 50) &&
	    op.kind != DISCARD && op.kind != ZEROOUT && op.kind != LOOK)
		op.flags |= URING;
	op.tag = new_tag();
	return op;
}

/*
 * Threads
 */

struct worker {
	pthread_t thread;
	unsigned int number;
	struct rng rng;
	struct io_uring ring;
	struct op *slots[RING];
	unsigned int under_way;
	bool done;
};

static __thread struct worker *self; /* of this thread, if it may have requests under way */

static void reap(struct worker *worker, bool wait)
{
	struct io_uring_cqe *cqe;
	unsigned int i;

	while (worker->under_way) {
		struct op *op;
		int ret = wait ? io_uring_wait_cqe(&worker->ring, &cqe) :
				 io_uring_peek_cqe(&worker->ring, &cqe);

		if (ret == -EAGAIN)
			return;
		if (ret == -EINTR)
			continue;
		if (ret)
			die("io_uring: %s", strerror(-ret));
		op = io_uring_cqe_get_data(cqe);
		ret = cqe->res;
		io_uring_cqe_seen(&worker->ring, cqe);
		worker->under_way--;
		for (i = 0; i < RING; i++)
			if (worker->slots[i] == op)
				worker->slots[i] = NULL;
		finish(op, ret);
		free(op);
		wait = false;
	}
}

/* Takes note of the requests of this thread that have ended. */
void reap_own(void)
{
	if (self)
		reap(self, false);
}

static void run_uring(struct worker *worker, const struct op *template)
{
	struct io_uring_sqe *sqe;
	struct op *op;
	unsigned int i;
	int ret;

	reap(worker, worker->under_way == RING);
	op = malloc(sizeof(*op));
	sqe = io_uring_get_sqe(&worker->ring);
	if (!op || !sqe)
		die("no room for an io_uring request");
	*op = *template;
	prepare(op, &worker->rng);
	for (i = 0; worker->slots[i]; i++)
		;
	worker->slots[i] = op;
	worker->under_way++;

	switch (op->kind) {
	case READ:
		io_uring_prep_readv(sqe, fd, op->iov, op->iovs, op->sector * SECTOR);
		sqe->rw_flags = rw_flags(op);
		break;
	case WRITE:
		io_uring_prep_writev(sqe, fd, op->iov, op->iovs, op->sector * SECTOR);
		sqe->rw_flags = rw_flags(op);
		break;
	case PUNCH:
	case ZERORANGE:
		io_uring_prep_fallocate(sqe, fd, falloc_mode(op->kind), op->sector * SECTOR,
					op->count * SECTOR);
		break;
	default:
		io_uring_prep_fsync(sqe, fd, 0);
	}
	io_uring_sqe_set_data(sqe, op);
	op_begin(op);
	do {
		ret = io_uring_submit(&worker->ring);
	} while (ret == -EINTR);
	if (ret != 1)
		die("io_uring_submit: %d", ret);
}

static void *work(void *arg)
{
	struct worker *worker = arg;
	unsigned int i;
	int ret = io_uring_queue_init(RING, &worker->ring, 0);

	if (ret)
		die("io_uring_queue_init: %s", strerror(-ret));
	self = worker;
	for (i = 0; i < cfg.ops && !stopping; i++) {
		struct op op = random_op(&worker->rng, worker->number);

		if (op.flags & URING)
			run_uring(worker, &op);
		else
			run_sync(&op, &worker->rng);
	}
	while (worker->under_way)
		reap(worker, true);
	io_uring_queue_exit(&worker->ring);
	__atomic_store_n(&worker->done, true, __ATOMIC_RELEASE);
	return NULL;
}

/*
 * Buffered I/O
 */

#define CACHED (windows[BUFFERED].sectors)
#define SINCE 6			/* writes of a sector between two fsyncs */
#define TRIES 200		/* to read what is right, once something was lost */

static struct cached {
	uint32_t tag;		/* what the page cache should say */
	uint32_t stored;	/* at the last fsync that went well */
	unsigned int n;
	uint32_t since[SINCE];	/* written later */
} cached[KIB(512)];
static uint64_t stale_pages;	/* reads of what was lost, that had to be repeated */

static void cached_set(uint32_t (*tag)(uint64_t sector))
{
	uint64_t s;

	for (s = 0; s < CACHED; s++)
		cached[s] = (struct cached){
			.tag = tag(windows[BUFFERED].first + s),
			.stored = tag(windows[BUFFERED].first + s),
		};
}

static uint32_t zero_tag(uint64_t sector)
{
	(void)sector;
	return TAG_ZERO;
}

/* Some of what was in the cache is lost: see what the device has, and go on from there. */
static void cached_recover(void)
{
	const struct window *w = &windows[BUFFERED];
	char *buf;
	uint64_t s;
	unsigned int i;

	model_lock();
	if (!limited_until)
		wrong("buffered writes were lost though nothing was full");
	model_unlock();
	if (ioctl(cached_fd, BLKFLSBUF))
		die("BLKFLSBUF: %s", strerror(errno));
	if (posix_memalign((void **)&buf, 4096, w->sectors * SECTOR))
		die("out of memory");
	if (pread(fd, buf, w->sectors * SECTOR, w->first * SECTOR) !=
	    (ssize_t)(w->sectors * SECTOR))
		die("cannot read after a lost buffered write");
	for (s = 0; s < CACHED; s++) {
		struct cached *c = &cached[s];
		uint32_t tag = stamp_tag(buf + s * SECTOR, w->first + s);
		bool right = tag == c->stored || tag == c->tag;

		for (i = 0; i < c->n; i++)
			right |= tag == c->since[i];
		if (!right)
			wrong("after a lost buffered write sector %" PRIu64
			      " has tag %u, neither %u nor later", w->first + s, tag, c->stored);
		*c = (struct cached){ .tag = tag, .stored = tag };
	}
	free(buf);
}

/* Returns: whether all that was written is on the device. */
static bool cached_sync(void)
{
	uint64_t s;

	if (fsync(cached_fd)) {
		if (errno != EIO && errno != ENOSPC)
			die("fsync: %s", strerror(errno));
		cached_recover();
		return false;
	}
	for (s = 0; s < CACHED; s++) {
		cached[s].stored = cached[s].tag;
		cached[s].n = 0;
	}
	return true;
}

/* The first of these sectors that is not as it should be, or @count. */
static uint64_t cached_compare(const char *buf, uint64_t s, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count; i++)
		if (stamp_tag(buf + i * SECTOR, windows[BUFFERED].first + s + i) !=
		    cached[s + i].tag)
			break;
	return i;
}

static void cached_wrong(const char *where, const char *buf, uint64_t s, uint64_t i)
{
	uint64_t sector = windows[BUFFERED].first + s + i;

	wrong("%s: sector %" PRIu64 " should have tag %u but has %u", where, sector,
	      cached[s + i].tag, stamp_tag(buf + i * SECTOR, sector));
}

static void cached_read(uint64_t s, uint64_t count, char *buf)
{
	uint64_t first = windows[BUFFERED].first + s, i;
	ssize_t len = count * SECTOR;
	unsigned int tries;
	bool lost;

	for (tries = 0;; tries++) {
		if (pread(cached_fd, buf, len, first * SECTOR) != len)
			die("buffered read at sector %" PRIu64 ": %s", first, strerror(errno));
		i = cached_compare(buf, s, count);
		if (i == count)
			return;
		/*
		 * A page that could not be written back may have been read again, or have
		 * been held when it was to be dropped, by reclaim on a CPU that got no time.
		 * The device has to be right all the same.
		 */
		lost = !cached_sync() || cfg.limits;
		if (tries == TRIES || !lost ||
		    stamp_tag(buf + i * SECTOR, first + i) == STAMP_UNKNOWN) {
			cached_wrong("buffered", buf, s, i);
			return;
		}
		if (pread(fd, buf, len, first * SECTOR) != len)
			die("cannot read what the page cache has otherwise");
		i = cached_compare(buf, s, count);
		if (i < count) {
			cached_wrong("unlike the page cache", buf, s, i);
			return;
		}
		stale_pages += !tries;
		if (tries > 1)
			usleep(10000);
		if (ioctl(cached_fd, BLKFLSBUF))
			die("BLKFLSBUF: %s", strerror(errno));
	}
}

static void cached_write(uint64_t s, uint64_t count, char *buf, uint32_t tag)
{
	const struct window *w = &windows[BUFFERED];
	ssize_t len = count * SECTOR;
	uint64_t i;

	for (i = 0; i < count; i++) {
		if (cached[s + i].n == SINCE) {
			cached_sync();
			break;
		}
	}
	stamp_range(buf, w->first + s, count, tag);
	for (i = 0; i < count; i++) {
		cached[s + i].tag = tag;
		cached[s + i].since[cached[s + i].n++] = tag;
	}
	if (pwrite(cached_fd, buf, len, (w->first + s) * SECTOR) != len)
		die("buffered write at sector %" PRIu64 ": %s", w->first + s, strerror(errno));
}

/* Whole blocks only: the kernel zeroes the edges of cached pages even so. */
static void cached_clear(uint64_t s, uint64_t count, bool discard)
{
	const struct window *w = &windows[BUFFERED];
	uint64_t range[2], i;
	int ret;

	cached_sync();
	s = s / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
	count = (count + SECTORS_PER_BLOCK - 1) / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
	if (s + count > CACHED)
		count = CACHED - s;
	range[0] = (w->first + s) * SECTOR;
	range[1] = count * SECTOR;
	ret = ioctl(cached_fd, discard ? BLKDISCARD : BLKZEROOUT, range);
	if (ret && errno == ENOSPC && !discard) {
		/* the kernel fell back to writing zeroes */
		for (i = 0; i < count; i++)
			cached[s + i].since[cached[s + i].n++] = TAG_ZERO;
		cached_recover();
		return;
	}
	if (ret)
		die("buffered discard: %s", strerror(errno));
	for (i = 0; i < count; i++)
		cached[s + i] = (struct cached){ 0 };
}

static void *work_buffered(void *arg)
{
	struct worker *worker = arg;
	struct rng *rng = &worker->rng;
	unsigned int i;
	char *buf;

	if (posix_memalign((void **)&buf, 4096, 64 * SECTOR))
		die("out of memory");
	for (i = 0; i < cfg.ops && !stopping; i++) {
		uint64_t count = 1 + below(rng, percent(rng, 20) ? 64 : 16);
		uint64_t s = below(rng, CACHED - count + 1);
		unsigned int dice = below(rng, 100);

		pthread_rwlock_rdlock(&cache_lock);
		if (dice < 40)
			cached_read(s, count, buf);
		else if (dice < 85)
			cached_write(s, count, buf, new_tag());
		else if (dice < 92)
			cached_clear(s, count, percent(rng, 50));
		else if (dice < 97)
			cached_sync();
		else if (cached_sync() && ioctl(cached_fd, BLKFLSBUF))
			die("BLKFLSBUF: %s", strerror(errno));
		pthread_rwlock_unlock(&cache_lock);
		__atomic_fetch_add(&total_ops, 1, __ATOMIC_RELAXED);
	}
	free(buf);
	__atomic_store_n(&worker->done, true, __ATOMIC_RELEASE);
	return NULL;
}

/*
 * Control
 */

static void check(int ret, const char *what)
{
	if (ret)
		die("%s: %s", what, strerror(-ret));
}

static void write_file(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);

	if (file >= 0) {
		/* only stirs the memory management, so it does not matter if it fails */
		(void)!write(file, text, strlen(text));
		close(file);
	}
}

/* Which is cfg.limit or cfg.total_limit. */
static void set_limit(long *which, long limit)
{
	model_lock();
	if (limit)
		limited_until = UINT64_MAX;
	*which = limit;
	model_unlock();
}

/* Once the kernel knows of it: from now on nothing may fail for want of space. */
static void limit_set(void)
{
	model_lock();
	if (!cfg.limit && !cfg.total_limit && !cfg.tmpfs && limited_until == UINT64_MAX)
		limited_until = model_tick();
	model_unlock();
}

void table_params(char *params, size_t size, unsigned int base, long limit)
{
	size_t n = snprintf(params, size, "%s %d", opt.bases[base],
			    (limit ? 2 : 0) + (cfg.tmpfs ? 2 : 0) + cfg.cow_on_read +
			    (cfg.cache_limit ? 2 : 0));

	if (limit)
		n += snprintf(params + n, size - n, " limit %ld", limit);
	if (cfg.tmpfs)
		n += snprintf(params + n, size - n, " tmpfs %s", opt.tmpfs);
	if (cfg.cow_on_read)
		n += snprintf(params + n, size - n, " cow_on_read");
	if (cfg.cache_limit)
		snprintf(params + n, size - n, " cache_limit %u", cfg.cache_limit);
}

static void nap(struct rng *rng, unsigned int most_us)
{
	struct timespec ts = { .tv_nsec = below(rng, most_us) * 1000 };

	nanosleep(&ts, NULL);
}

static void clear_device(void)
{
	uint64_t range[2] = { 0, cfg.sectors * SECTOR };

	if (ioctl(fd, BLKDISCARD, range))
		wrong("discard of the device: %s", strerror(errno));
}

/*
 * Resumes, with the table that was loaded last. The core writes back what is
 * cached before it exchanges tables, and stops where something was lost.
 */
void resume(const char *what)
{
	int ret = dm_resume(NAME);

	if (ret && cfg.buffered && cfg.limits) {
		check(dm_suspend(NAME, DM_SKIP_LOCKFS_FLAG), "suspend");
		ret = dm_resume(NAME);
	}
	check(ret, what);
}

/* A change of the whole device. */
static void run_whole(struct op *op)
{
	if (cfg.buffered) {
		pthread_rwlock_wrlock(&cache_lock);
		cached_sync();
	}
	op_begin(op);
	if (op->suspended)
		check(dm_suspend(NAME, DM_SKIP_LOCKFS_FLAG), "suspend");
	if (op->kind == RESET)
		check(dm_message(NAME, "reset"), "reset");
	else
		clear_device();
	if (op->suspended)
		resume("resume");
	op_end(op, 0, DONE);
	if (cfg.buffered) {
		if (ioctl(cached_fd, BLKFLSBUF))
			die("BLKFLSBUF: %s", strerror(errno));
		cached_set(op->kind == RESET ? initial_tag : zero_tag);
		pthread_rwlock_unlock(&cache_lock);
	}
}

/* Returns: 0, or -EBUSY when a view kept the device from becoming longer. */
static int run_reload(const struct op *op)
{
	uint64_t sectors = op->sectors > cfg.sectors || op->abandon ? op->sectors : cfg.sectors;
	struct dm_call call = { 0 };
	char params[512];
	int ret;

	table_params(params, sizeof(params), op->base, op->limit);
	if (views_exist() &&
	    (sectors - 1) / SECTORS_PER_BLOCK > (longest - 1) / SECTORS_PER_BLOCK) {
		ret = dm_load(NAME, sectors, "nbdcow", params);
		if (ret != -EBUSY)
			wrong("a longer table beside a view: %s", strerror(-ret));
		return ret;
	}
	if (sectors > longest)
		longest = sectors;
	if (op->abandon) {
		/* a table that is too short for the changes is refused */
		ret = dm_load(NAME, sectors, "nbdcow", params);
		if (ret != -EINVAL || sectors >= cfg.sectors)
			check(ret, "loading a table");
		check(dm_call(DM_TABLE_CLEAR, NAME, 0, &call), "clearing a table");
		return 0;
	}
	if (op->suspended)
		check(dm_suspend(NAME, DM_SKIP_LOCKFS_FLAG), "suspend");
	set_limit(&cfg.limit, op->limit);
	cfg.base = op->base;
	check(dm_load(NAME, sectors, "nbdcow", params), "loading a table");
	resume("taking a new table");
	limit_set();
	__atomic_store_n(&cfg.sectors, sectors, __ATOMIC_RELEASE);
	return 0;
}

static void run_limit(const struct op *op)
{
	char text[64];

	set_limit(op->total ? &cfg.total_limit : &cfg.limit, op->limit);
	if (op->total) {
		if (op->limit)
			views_may_fail();
		if (op->limit)
			snprintf(text, sizeof(text), "%ldK", op->limit * 4);
		else
			snprintf(text, sizeof(text), "%s", total_limit);
		write_file(TOTAL_LIMIT, text);
	} else {
		if (op->limit)
			snprintf(text, sizeof(text), "limit %ld", op->limit);
		else
			snprintf(text, sizeof(text), "limit none");
		check(dm_message(NAME, text), text);
	}
	limit_set();
}

void run_control(struct op *op, struct rng *rng)
{
	int ret = 0;

	if (whole_device(op)) {
		run_whole(op);
		return;
	}
	op_begin(op);
	switch (op->kind) {
	case LIMIT:
		run_limit(op);
		break;
	case CACHE:
		/* one prefetch may be under way */
		ret = dm_message(NAME, cache_messages[op->message]);
		if (ret != -EBUSY)
			check(ret, cache_messages[op->message]);
		ret = 0;
		break;
	case SUSPEND:
		if (dm_suspend(NAME, op->suspend_flags))
			check(dm_suspend(NAME, op->suspend_flags | DM_SKIP_LOCKFS_FLAG), "suspend");
		nap(rng, 3000);
		resume("resume");
		break;
	case VIEW:
		view_begin(op, rng);
		break;
	case UNVIEW:
		view_end(op);
		break;
	default:
		ret = run_reload(op);
	}
	op_end(op, ret, DONE);
}

/* With one base that does not know it, nobody may say RWF_NOWAIT. */
static unsigned int random_base(struct rng *rng)
{
	return below(rng, cfg.nowait ? opt.nr_nowait : opt.nr_bases);
}

struct op random_control(struct rng *rng, unsigned int thread)
{
	struct op op = { .thread = thread };
	unsigned int dice = below(rng, 100);

	op.kind = dice < 20 ? RESET : dice < 35 ? LIMIT : dice < 45 ? SUSPEND :
		  dice < 70 ? RELOAD : dice < 80 || !cfg.caches ? CLEAR_ALL : CACHE;
	if (percent(rng, cfg.percent_views))
		op.kind = percent(rng, 80) ? VIEW : UNVIEW;
	op.view = below(rng, VIEWS);
	op.message = below(rng, CACHE_MESSAGES);
	op.limit = percent(rng, 50) || !cfg.limits ? 0 : 1 + below(rng, 300);
	op.total = percent(rng, 30);
	op.suspended = op.kind != CLEAR_ALL && op.kind != CACHE && op.kind != UNVIEW &&
		       percent(rng, 30);
	op.suspend_flags = (percent(rng, 50) ? DM_SKIP_LOCKFS_FLAG : 0) |
			   (percent(rng, 30) ? DM_NOFLUSH_FLAG : 0);
	op.base = random_base(rng);
	op.abandon = percent(rng, 20);
	op.sectors = sizes[below(rng, percent(rng, 30) ? 3 : 1)];
	if (op.kind == VIEW) {
		op.sectors = LARGEST;
		op.window = below(rng, BUFFERED);
		op.count = cfg.hot < 128 ? cfg.hot : 128;
		op.sector = windows[op.window].first +
			    (windows[op.window].sectors - cfg.hot) / 2 / 8 * 8;
	}
	if ((op.abandon || op.kind == VIEW) && percent(rng, 30))
		op.sectors = 1 + below(rng, sizes[0]);
	return op;
}

/* Moves memory about, or out of the cgroup to swap. */
static void stir_memory(struct rng *rng)
{
	char path[300];

	if (percent(rng, 5))
		write_file("/proc/sys/vm/compact_memory", "1");
	if (percent(rng, 5))
		write_file("/proc/sys/vm/drop_caches", "3");
	if (opt.cgroup && percent(rng, 50)) {
		snprintf(path, sizeof(path), "%s/memory.reclaim", opt.cgroup);
		write_file(path, "16M");
	}
}

static void *work_control(void *arg)
{
	struct worker *worker = arg;

	while (!stopping) {
		struct op op = random_control(&worker->rng, worker->number);

		if (with(CONTROL))
			run_control(&op, &worker->rng);
		if (with(VM))
			stir_memory(&worker->rng);
		nap(&worker->rng, cfg.percent_views > 50 ? 500 : 20000);
	}
	return NULL;
}

/*
 * Rounds
 */

static void open_device(void)
{
	struct dm_call call = { 0 };
	char params[512];

	check(dm_call(DM_DEV_CREATE, NAME, 0, &call), "creating the device");
	snprintf(device, sizeof(device), "/dev/dm-%u", minor(call.head.dev));
	table_params(params, sizeof(params), cfg.base, cfg.limit);
	check(dm_load(NAME, cfg.sectors, "nbdcow", params), "loading the first table");
	check(dm_resume(NAME), "taking the first table");
	longest = cfg.sectors;
	fd = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
	cached_fd = open(device, O_RDWR | O_CLOEXEC);
	if (fd < 0 || cached_fd < 0)
		die("%s: %s", device, strerror(errno));
}

static void remove_device(void)
{
	int ret;

	if (fd >= 0)
		close(fd);
	if (cached_fd >= 0)
		close(cached_fd);
	fd = cached_fd = -1;
	ret = dm_remove(NAME);
	if (ret != -ENXIO)
		check(ret, "removing the device");
}

/* Nothing is under way: all is read, and the status compared with the model. */
bool verify(struct rng *rng)
{
	unsigned int w, stored, used, most;
	struct dm_call call;
	char health[32];
	uint64_t b;

	if (!views_verify())
		return false;
	/* so that no read is told of a lost buffered write */
	(void)!fsync(fd);
	if (cfg.buffered)
		cached_sync();
	for (w = 0; w < BUFFERED; w++) {
		uint64_t at = windows[w].first;
		uint64_t end = at + windows[w].sectors;

		if (end > cfg.sectors)
			end = cfg.sectors;
		for (; at < end; at += LONGEST) {
			struct op op = {
				.kind = READ, .window = w, .sector = at,
				.count = end - at < LONGEST ? end - at : LONGEST,
			};

			if (!run_sync(&op, rng))
				return false;
		}
	}
	if (cfg.buffered) {
		if (ioctl(cached_fd, BLKFLSBUF))
			die("BLKFLSBUF: %s", strerror(errno));
		for (b = 0; b < CACHED; b += 64) {
			char buf[64 * SECTOR] __attribute__((aligned(4096)));

			cached_read(b, 64, buf);
		}
	}

	model_count(&stored, &most);
	if (broken)
		return false;
	check(dm_status(NAME, &call), "status");
	if (sscanf(call.table.params, "%31s %u/", health, &used) != 2)
		die("unknown status %s", call.table.params);
	if (cfg.buffered)
		most += CACHED / SECTORS_PER_BLOCK;
	if (used < stored || used > most) {
		wrong("%u blocks are stored by the status, expected %u to %u", used, stored, most);
		return false;
	}
	return true;
}

static void check_total_used(uint64_t want)
{
	FILE *f = fopen("/sys/module/dm_nbdcow/parameters/total_used", "r");
	uint64_t used;

	if (!f || fscanf(f, "%" SCNu64, &used) != 1)
		die("cannot read total_used");
	fclose(f);
	if (used != want)
		die("%" PRIu64 " blocks are in use without the device, before it were %" PRIu64,
		    used, want);
}

void start_round(uint64_t seed, struct rng *rng)
{
	static const unsigned int hot[] = { 8, 16, 32, 128, 1024 };
	static const unsigned int stripes[] = { 1, 3, 8, 20 };

	*rng = (struct rng){ seed };
	cfg.seed = seed;
	cfg.sectors = sizes[below(rng, 2)];
	cfg.buffered = percent(rng, 60) && opt.threads > 2 && with(BUFFERED_IO);
	cfg.tmpfs = percent(rng, 40) && opt.tmpfs;
	cfg.limits = (percent(rng, cfg.buffered ? 20 : 60) && with(LIMITS)) || cfg.tmpfs;
	cfg.limit = percent(rng, 50) && cfg.limits ? 1 + below(rng, 300) : 0;
	cfg.total_limit = 0;
	cfg.hot = hot[below(rng, 5)];
	cfg.percent_hot = 50 + below(rng, 51);
	cfg.nowait = percent(rng, 50) && opt.nr_nowait && with(NOWAITS);
	cfg.base = random_base(rng);
	cfg.big = percent(rng, 50) && with(BIG);
	cfg.caches = percent(rng, 60) && with(CACHES);
	cfg.cow_on_read = cfg.caches && percent(rng, 70);
	cfg.cache_limit = cfg.caches && percent(rng, 30) ? 1 + below(rng, 600) : 0;
	cfg.percent_views = percent(rng, 60) && with(VIEWED) ? percent(rng, 50) ? 30 : 95 : 0;
	cfg.control = percent(rng, 70) && (with(CONTROL) || with(VM));
	cfg.stripe = percent(rng, 25) && opt.threads > 1 ? stripes[below(rng, 4)] : 0;
	cfg.ops = 100 + below(rng, 900);
	if (opt.ops && cfg.ops > opt.ops)
		cfg.ops = opt.ops;
	model_lock();
	limited_until = cfg.limit || cfg.tmpfs ? UINT64_MAX : 0;
	model_reset();
	model_unlock();
	cached_set(initial_tag);
	next_tag = 0;
	broken = stopping = false;
	open_device();
}

void end_round(void)
{
	views_remove();
	remove_device();
	write_file(TOTAL_LIMIT, total_limit);
}

/* What is under way, and where in the kernel our threads are. */
static void print_hanging(void)
{
	DIR *dir = opendir("/proc/self/task");
	struct dirent *entry;

	print_under_way();
	while (dir && (entry = readdir(dir))) {
		char path[300], line[200];
		FILE *f;

		snprintf(path, sizeof(path), "/proc/self/task/%s/stack", entry->d_name);
		f = fopen(path, "r");
		while (f && fgets(line, sizeof(line), f))
			printf("# task %s: %s", entry->d_name, line);
		if (f)
			fclose(f);
	}
}

static void join(struct worker *worker, const char *what)
{
	uint64_t ops = 0;
	struct timespec ts;
	time_t moved = time(NULL);

	do {
		if (ops != __atomic_load_n(&total_ops, __ATOMIC_RELAXED)) {
			ops = __atomic_load_n(&total_ops, __ATOMIC_RELAXED);
			moved = time(NULL);
		}
		if (time(NULL) - moved > HANG) {
			print_hanging();
			die("%s hangs", what);
		}
		if (time(NULL) >= deadline)
			stopping = true;
		clock_gettime(CLOCK_REALTIME, &ts);
		ts.tv_sec++;
	} while (pthread_timedjoin_np(worker->thread, NULL, &ts));
}

bool threads_round(struct rng *rng)
{
	static struct worker workers[THREADS + 1];
	struct worker *control = &workers[THREADS];
	unsigned int i;

	for (i = 0; i < opt.threads; i++) {
		workers[i] = (struct worker){ .number = i, .rng = { next_random(rng) } };
		if (pthread_create(&workers[i].thread, NULL,
				   cfg.buffered && !i ? work_buffered : work, &workers[i]))
			die("cannot start a thread");
	}
	*control = (struct worker){ .number = THREADS, .rng = { next_random(rng) } };
	if (cfg.control && pthread_create(&control->thread, NULL, work_control, control))
		die("cannot start a thread");
	for (i = 0; i < opt.threads; i++)
		join(&workers[i], "a thread");
	stopping = true;
	if (cfg.control)
		join(control, "the control thread");
	return !broken && verify(rng);
}

static void usage(void)
{
	puts("usage: fuzz [OPTION]... BASE...\n"
	     "BASE is a block device with the content that `io BASE 'write 0 end .'` gives; more\n"
	     "than one must have the same, those that know RWF_NOWAIT first.\n"
	     "  --seed N       replays the run with this seed\n"
	     "  --seconds N    how long, default 60\n"
	     "  --rounds N     how many rounds at most\n"
	     "  --repeat       each of them with the seed itself\n"
	     "  --threads N    default 4; with 1 a failure is certain to come again\n"
	     "  --ops N        of each thread in a round, at most\n"
	     "  --without LIST of buffered,control,limits,nowait,uring,big,zeroes,vm,\n"
	     "                 cache,views\n"
	     "  --tmpfs DIR    a directory on a tmpfs, where some rounds store their blocks\n"
	     "  --cgroup DIR   whose memory is pushed to swap now and then");
}

static bool parse_without(char *list)
{
	unsigned int i;
	char *name;

	for (name = strtok(list, ","); name; name = strtok(NULL, ",")) {
		for (i = 0; i < FEATURES && strcmp(name, features[i]); i++)
			;
		if (i == FEATURES)
			return false;
		opt.without |= 1U << i;
	}
	return true;
}

static bool parse_options(int argc, char **argv)
{
	static const struct option options[] = {
		{ "seed", required_argument, NULL, 's' },
		{ "seconds", required_argument, NULL, 't' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "threads", required_argument, NULL, 'n' },
		{ "repeat", no_argument, NULL, 'R' },
		{ "ops", required_argument, NULL, 'o' },
		{ "without", required_argument, NULL, 'w' },
		{ "tmpfs", required_argument, NULL, 'd' },
		{ "cgroup", required_argument, NULL, 'c' },
		{ NULL, 0, NULL, 0 },
	};
	struct timespec ts;
	int c;

	clock_gettime(CLOCK_REALTIME, &ts);
	opt.seed = (ts.tv_sec * 1000000ULL + ts.tv_nsec / 1000) % 1000000000;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 's':
			opt.seed = strtoull(optarg, NULL, 0);
			break;
		case 't':
			opt.seconds = atoi(optarg);
			break;
		case 'r':
			opt.rounds = atoi(optarg);
			break;
		case 'n':
			opt.threads = atoi(optarg);
			break;
		case 'R':
			opt.repeat = true;
			break;
		case 'o':
			opt.ops = atoi(optarg);
			break;
		case 'w':
			if (!parse_without(optarg))
				return false;
			break;
		case 'd':
			opt.tmpfs = optarg;
			break;
		case 'c':
			opt.cgroup = optarg;
			break;
		default:
			return false;
		}
	}
	opt.bases = argv + optind;
	opt.nr_bases = argc - optind;
	return opt.nr_bases && opt.threads && opt.threads <= THREADS;
}

static void look_at_bases(void)
{
	char buf[4096] __attribute__((aligned(4096)));
	struct iovec iov = { buf, sizeof(buf) };
	unsigned int i;
	uint64_t size;

	for (i = 0; i < opt.nr_bases; i++) {
		int base = open(opt.bases[i], O_RDONLY | O_DIRECT | O_CLOEXEC);

		if (base < 0 || ioctl(base, BLKGETSIZE64, &size))
			die("%s: %s", opt.bases[i], strerror(errno));
		if (i && size / SECTOR != base_sectors)
			die("%s has another size", opt.bases[i]);
		base_sectors = size / SECTOR;
		if (i == opt.nr_nowait &&
		    (preadv2(base, &iov, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN))
			opt.nr_nowait++;
		close(base);
	}
}

static void read_total_limit(void)
{
	FILE *f = fopen(TOTAL_LIMIT, "r");

	if (!f || fscanf(f, "%63s", total_limit) != 1)
		die("cannot read " TOTAL_LIMIT);
	fclose(f);
}

int main(int argc, char **argv)
{
	time_t start = time(NULL), told = start;
	struct rng seeds, rng;
	bool right = true;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!parse_options(argc, argv)) {
		usage();
		return 2;
	}
	/* swapping is for the overlays */
	if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		die("mlockall: %s", strerror(errno));
	model_init();
	views_init();
	look_at_bases();
	read_total_limit();
	printf("# seed %" PRIu64 ", %u threads\n", opt.seed, opt.threads);
	seeds.state = opt.seed;
	deadline = start + opt.seconds;
	do {
		/* the first round has the seed itself, so that it can be given back */
		start_round(cfg.number++ && !opt.repeat ? next_random(&seeds) : opt.seed, &rng);
		right = opt.threads == 1 ? single_round(&rng) : threads_round(&rng);
		if (!right)
			break;
		end_round();
		check_total_used(0);
		if (time(NULL) - told >= 60) {
			told = time(NULL);
			printf("# %ld s: %u rounds, %" PRIu64 " operations; last seed %" PRIu64
			       "\n", told - start, cfg.number, total_ops, cfg.seed);
		}
	} while (time(NULL) < deadline && (!opt.rounds || cfg.number < opt.rounds));
	if (!right) {
		print_replay();
		if (opt.threads > 1) {
			simplify();
			print_replay();
		}
		end_round();
		return 1;
	}
	printf("# %ld s: %u rounds, %" PRIu64 " operations (%" PRIu64 " with RWF_NOWAIT, %" PRIu64
	       " of them ended with EAGAIN; %" PRIu64 " buffered reads repeated), nothing wrong\n",
	       time(NULL) - start, cfg.number, total_ops, nowait_ops, nowait_again, stale_pages);
	return 0;
}
