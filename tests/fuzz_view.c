// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz_view - views of the device, and what each may show
 *
 * At its freeze a view takes from the model what a read at that time might see. What
 * is read of it later must be among that, and the same each time; and there must be
 * one instant at which the device held all that was read of it.
 */
#define _GNU_SOURCE
#include <fcntl.h>

#include "dmctl.h"
#include "fuzz.h"

#define SECTORS (MODEL + KIB(512)) /* in all windows */

/* What a sector of the view holds. */
struct sector {
	unsigned int first, n;	/* what is possible; nothing is known of buffered I/O */
	uint64_t seen;		/* a hash of what was read there, or 0 */
};

static struct view {
	char name[32];
	int fd;			/* or -1 if there is none */
	uint64_t length;	/* sectors */
	bool may_fail;		/* there may have been no room to keep a block */
	struct possible *possible;
	struct sector sectors[SECTORS];
	uint64_t after, before;	/* the instant lies between, as far as is known */
	pthread_rwlock_t lock;	/* for the above: write-locked by who makes or removes it */
	pthread_mutex_t mutex;	/* for seen, after and before */
} views[VIEWS];

bool views_exist(void)
{
	unsigned int i;

	for (i = 0; i < VIEWS; i++)
		if (views[i].fd >= 0)
			return true;
	return false;
}

/* From now on there may be no room. */
void views_may_fail(void)
{
	unsigned int i;

	for (i = 0; i < VIEWS; i++)
		__atomic_store_n(&views[i].may_fail, true, __ATOMIC_RELAXED);
}

void views_init(void)
{
	unsigned int i;

	for (i = 0; i < VIEWS; i++) {
		snprintf(views[i].name, sizeof(views[i].name), NAME "-view%u", i);
		views[i].fd = -1;
		pthread_rwlock_init(&views[i].lock, NULL);
		pthread_mutex_init(&views[i].mutex, NULL);
	}
}

void view_params(char *params, size_t size, const struct op *op)
{
	snprintf(params, size, "%s %s", device, opt.bases[op->base]);
}

/*
 * Reading
 */

static uint64_t hash_of(const char *buf)
{
	const uint64_t *words = (const uint64_t *)buf;
	uint64_t hash = 1;
	unsigned int i;

	for (i = 0; i < STAMP_WORDS; i++)
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ULL;
	return hash | 1;
}

/* Returns: what is wrong with the sector, or NULL. */
static const char *judge(struct view *view, struct sector *sector, const char *buf,
			 uint64_t number)
{
	uint32_t tag = stamp_tag(buf, number);
	uint64_t hash = hash_of(buf), start = UINT64_MAX, gone = 0;
	unsigned int i;

	if (sector->seen)
		return sector->seen == hash ? NULL : "has changed";
	sector->seen = hash;
	if (!sector->n)
		return NULL;
	for (i = sector->first; i < sector->first + sector->n; i++) {
		const struct possible *p = &view->possible[i];

		if (p->tag != tag)
			continue;
		start = p->start < start ? p->start : start;
		gone = p->gone > gone ? p->gone : gone;
	}
	if (!gone)
		return "shows what it never may";
	view->after = start > view->after ? start : view->after;
	view->before = gone < view->before ? gone : view->before;
	return view->after < view->before ? NULL : "shows another instant than the rest";
}

static void print_view(const struct view *view, const struct sector *sector, const char *buf,
		       uint64_t number, const char *fault)
{
	unsigned int i;

	if (!news())
		return;
	flockfile(stdout);
	printf("# round %u: %s: sector %" PRIu64 " (block %" PRIu64 ") %s: ", cfg.number,
	       view->name, number, number / SECTORS_PER_BLOCK, fault);
	stamp_print(stdout, buf, number);
	printf("\n# it may have");
	for (i = sector->first; i < sector->first + sector->n; i++)
		printf(" tag %u (%" PRIu64 "-%" PRIi64 ")", view->possible[i].tag,
		       view->possible[i].start, (int64_t)view->possible[i].gone);
	printf(", and the instant is between %" PRIu64 " and %" PRIu64 "\n", view->after,
	       view->before);
	print_history(number);
	funlockfile(stdout);
}

static bool is_lost(struct view *view)
{
	struct dm_call call;
	int ret = dm_status(view->name, &call);

	if (ret)
		die("status of %s: %s", view->name, strerror(-ret));
	return __atomic_load_n(&view->may_fail, __ATOMIC_RELAXED) &&
	       !strncmp(call.table.params, "failed ", 7);
}

static char *get_buffer(uint64_t count)
{
	char *buf;

	if (posix_memalign((void **)&buf, 4096, count * SECTOR))
		die("out of memory");
	return buf;
}

/* @ret: what a read of a part of a window returned. */
static void judge_read(struct view *view, unsigned int window, uint64_t at, uint64_t count,
		       const char *buf, ssize_t ret)
{
	const struct window *w = &windows[window];
	const char *fault = NULL;
	ssize_t s;

	if (ret < (ssize_t)(count * SECTOR) && !is_lost(view))
		wrong("%s: read of %" PRIu64 "s at %" PRIu64 "s: %s", view->name, count, at,
		      ret < 0 ? strerror(-ret) : "too short");
	for (s = 0; s < ret / SECTOR && !fault; s++) {
		struct sector *sector = &view->sectors[w->index + at + s - w->first];

		pthread_mutex_lock(&view->mutex);
		fault = judge(view, sector, buf + s * SECTOR, at + s);
		pthread_mutex_unlock(&view->mutex);
		if (fault) {
			wrong_view = view - views;
			wrong_sector = at + s;
			print_view(view, sector, buf + s * SECTOR, at + s, fault);
		}
	}
}

static ssize_t read_sectors(struct view *view, uint64_t at, uint64_t count, char *buf)
{
	ssize_t ret = pread(view->fd, buf, count * SECTOR, at * SECTOR);

	return ret < 0 ? -errno : ret;
}

/* Reads a part of a window. Returns: whether all was right. */
static bool view_read(struct view *view, unsigned int window, uint64_t at, uint64_t count)
{
	char *buf;

	if (at >= view->length)
		return true;
	if (count > view->length - at)
		count = view->length - at;
	buf = get_buffer(count);
	judge_read(view, window, at, count, buf, read_sectors(view, at, count, buf));
	free(buf);
	return !broken;
}

/* Reads a view if it is there, as any thread may. */
bool view_look(struct op *op)
{
	struct view *view = &views[op->view];
	bool right = true;

	op_begin(op);
	pthread_rwlock_rdlock(&view->lock);
	if (view->fd >= 0)
		right = view_read(view, op->window, op->sector, op->count);
	pthread_rwlock_unlock(&view->lock);
	op_end(op, 0, DONE);
	return right;
}

/* Reads all of it; by who makes and removes views. */
static bool view_verify(struct view *view)
{
	unsigned int w;
	uint64_t at, end, n;

	for (w = 0; w < WINDOWS && view->fd >= 0; w++) {
		end = windows[w].first + windows[w].sectors;
		for (at = windows[w].first; at < end; at += n) {
			n = end - at < LONGEST ? end - at : LONGEST;
			if (!view_read(view, w, at, n))
				return false;
		}
	}
	return true;
}

bool views_verify(void)
{
	unsigned int i;

	for (i = 0; i < VIEWS; i++)
		if (!view_verify(&views[i]))
			return false;
	return true;
}

/* What a wrong sector should have, or STAMP_UNKNOWN if that is not sure. */
uint32_t view_tag(uint64_t number)
{
	const struct view *view = &views[wrong_view];
	unsigned int w;

	for (w = 0; w < BUFFERED; w++) {
		const struct sector *sector =
			&view->sectors[windows[w].index + number - windows[w].first];

		if (number - windows[w].first < windows[w].sectors && number < view->length)
			return sector->n == 1 ? view->possible[sector->first].tag : STAMP_UNKNOWN;
	}
	return STAMP_UNKNOWN;
}

/*
 * Making and removing
 */

static void view_remove(struct view *view)
{
	int ret;

	pthread_rwlock_wrlock(&view->lock);
	if (view->fd >= 0) {
		close(view->fd);
		ret = dm_remove(view->name);
		if (ret)
			die("removing %s: %s", view->name, strerror(-ret));
		free(view->possible);
		view->possible = NULL;
		view->fd = -1;
	}
	pthread_rwlock_unlock(&view->lock);
}

void views_remove(void)
{
	unsigned int i;

	for (i = 0; i < VIEWS; i++)
		view_remove(&views[i]);
}

void view_end(const struct op *op)
{
	if (view_verify(&views[op->view]))
		view_remove(&views[op->view]);
}

static uint64_t clock_now(void)
{
	uint64_t now;

	model_lock();
	now = model_tick();
	model_unlock();
	return now;
}

/* What the device may have held at some time between view->after and view->before. */
static void take_possible(struct view *view)
{
	unsigned int i, total = 0;

	free(view->possible);
	memset(view->sectors, 0, sizeof(view->sectors));
	model_lock();
	for (i = 0; i < MODEL; i++)
		total += model_possible(i, view->after, view->before, NULL);
	view->possible = malloc(total * sizeof(*view->possible));
	if (!view->possible)
		die("out of memory");
	for (total = i = 0; i < MODEL; i++) {
		struct sector *sector = &view->sectors[i];

		sector->first = total;
		sector->n = model_possible(i, view->after, view->before,
					   view->possible + total);
		total += sector->n;
	}
	model_unlock();
}

static void view_open(struct view *view)
{
	unsigned int number = 0;
	char path[32];
	int ret = dm_minor(view->name, &number);

	snprintf(path, sizeof(path), "/dev/dm-%u", number);
	view->fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (ret || view->fd < 0)
		die("%s: %s", path, strerror(ret ? -ret : errno));
}

/*
 * Makes a view, or gives one that is there another table, which is another instant.
 * What is used most is read at once, before anybody can know what it may be.
 */
void view_begin(const struct op *op, struct rng *rng)
{
	uint64_t length = op->sectors < cfg.sectors ? op->sectors : cfg.sectors;
	uint64_t at = op->sector, count = at < length ? length - at : 0;
	struct view *view = &views[op->view];
	char params[512], *buf;
	ssize_t got = 0;
	int ret = 0;

	if (count > op->count)
		count = op->count;
	if (percent(rng, 50) && !view_verify(view))
		return;
	view_params(params, sizeof(params), op);
	buf = get_buffer(op->count);
	pthread_rwlock_wrlock(&view->lock);
	if (view->fd < 0)
		ret = dm_create(view->name);
	ret = ret ?: dm_load_flags(view->name, length, "nbdcow-view", params, DM_READONLY_FLAG);
	if (!ret && view->fd < 0)
		view_open(view);
	if (op->suspended)
		ret = ret ?: dm_suspend(NAME, DM_SKIP_LOCKFS_FLAG);
	view->after = clock_now();
	ret = ret ?: dm_resume(view->name);
	view->before = clock_now();
	if (ret)
		die("making %s: %s", view->name, strerror(-ret));
	if (count)
		got = read_sectors(view, at, count, buf);
	view->length = length;
	view->may_fail = cfg.tmpfs || cfg.total_limit;
	take_possible(view);
	if (op->suspended)
		resume("resume");
	judge_read(view, op->window, at, count, buf, got);
	pthread_rwlock_unlock(&view->lock);
	free(buf);
	if (percent(rng, 50))
		view_verify(view);
}
