// SPDX-License-Identifier: GPL-2.0-only
/*
 * What user space sees: the table line, the status line, the messages.
 */
#include <linux/ctype.h>
#include <linux/kstrtox.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow"

/**
 * nbdcow_parse_limit() - parse the argument of `limit'
 * @arg: a number of blocks, at least 1
 * @limit: set on success
 *
 * Context: any.
 * Return: 0 or -EINVAL.
 */
int nbdcow_parse_limit(const char *arg, unsigned long *limit)
{
	unsigned long value;

	if (!isdigit(*arg) || kstrtoul(arg, 10, &value) || !value ||
	    value > LONG_MAX)
		return -EINVAL;
	*limit = value;
	return 0;
}

/**
 * nbdcow_decode_path() - undo the %XX encoding of a path, in place
 * @path: the path as it stands in a table line
 *
 * Device-mapper splits lines at blanks, and libdevmapper doubles backslashes,
 * so neither gets through as it is.
 *
 * Context: any.
 * Return: 0 or -EINVAL.
 */
int nbdcow_decode_path(char *path)
{
	char *to = path;

	for (; *path; path++) {
		if (*path == '%') {
			u8 byte;

			if (hex2bin(&byte, path + 1, 1) || !byte)
				return -EINVAL;
			*to++ = byte;
			path += 2;
		} else {
			*to++ = *path;
		}
	}
	*to = '\0';
	return 0;
}

static void emit_path(const char *path, char *result, unsigned int maxlen,
		      unsigned int *size)
{
	unsigned int sz = *size;

	for (; *path; path++) {
		/* The kernel's isgraph() knows Latin-1; this is ASCII. */
		if (isascii(*path) && isgraph(*path) && *path != '\\' &&
		    *path != '%')
			DMEMIT("%c", *path);
		else
			DMEMIT("%%%02X", (u8)*path);
	}
	*size = sz;
}

static void emit_table(struct nbdcow_target *t, char *result,
		       unsigned int maxlen)
{
	unsigned long cache_limit = READ_ONCE(t->cache_limit);
	bool cow_on_cache = READ_ONCE(t->cow_on_cache);
	bool queue_errors = READ_ONCE(t->queue_errors);
	bool cow_on_read = READ_ONCE(t->cow_on_read);
	const char *dir = t->overlay->tmpfs_dir;
	unsigned long limit = READ_ONCE(t->limit);
	unsigned int sz = 0;

	DMEMIT("%s %u", t->dev->name,
	       (limit != NBDCOW_NO_LIMIT ? 2 : 0) + (dir ? 2 : 0) +
	       cow_on_read + cow_on_cache +
	       (cache_limit != NBDCOW_NO_LIMIT ? 2 : 0) + queue_errors);
	if (limit != NBDCOW_NO_LIMIT)
		DMEMIT(" limit %lu", limit);
	if (dir) {
		DMEMIT(" tmpfs ");
		emit_path(dir, result, maxlen, &sz);
	}
	if (cow_on_read)
		DMEMIT(" cow_on_read");
	if (cow_on_cache)
		DMEMIT(" cow_on_cache");
	if (cache_limit != NBDCOW_NO_LIMIT)
		DMEMIT(" cache_limit %lu", cache_limit);
	if (queue_errors)
		DMEMIT(" queue_errors");
}

static const char *health_name(struct nbdcow_target *t)
{
	if (READ_ONCE(t->base_failed) ||
	    bdev_nr_sectors(t->dev->bdev) < t->overlay->base_sectors)
		return "base-error";

	switch (nbdcow_overlay_level(t->overlay)) {
	case NBDCOW_FULL:
		return "full";
	case NBDCOW_HIGH:
		return "high";
	default:
		return "ok";
	}
}

/* "<used>/<limit>", with - for no limit. */
static unsigned int emit_part(char *result, unsigned int maxlen,
			      unsigned int sz, long used, unsigned long limit)
{
	if (limit == NBDCOW_NO_LIMIT)
		DMEMIT(" %ld/-", used);
	else
		DMEMIT(" %ld/%lu", used, limit);
	return sz;
}

static void sum_stats(struct nbdcow_overlay *ov, struct nbdcow_stats *sum)
{
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		struct nbdcow_stats *stats = per_cpu_ptr(ov->stats, cpu);

		sum->overlay += READ_ONCE(stats->overlay);
		sum->hits += READ_ONCE(stats->hits);
		sum->misses += READ_ONCE(stats->misses);
		sum->base += READ_ONCE(stats->base);
	}
}

static unsigned int emit_prefetch(struct nbdcow_prefetch *prefetch, char *result,
				  unsigned int maxlen, unsigned int sz)
{
	static const char * const names[] = {
		[NBDCOW_PREFETCH_RUNNING] = "running",
		[NBDCOW_PREFETCH_DONE] = "done",
		[NBDCOW_PREFETCH_STOPPED] = "stopped",
		[NBDCOW_PREFETCH_FULL] = "full",
		[NBDCOW_PREFETCH_FAILED] = "failed",
	};

	spin_lock(&prefetch->lock);
	if (prefetch->state == NBDCOW_PREFETCH_NONE)
		DMEMIT(" -");
	else
		DMEMIT(" %s:%llu/%llu", names[prefetch->state],
		       READ_ONCE(prefetch->next) - prefetch->first,
		       prefetch->end - prefetch->first);
	spin_unlock(&prefetch->lock);
	return sz;
}

static void emit_info(struct nbdcow_target *t, char *result,
		      unsigned int maxlen)
{
	struct nbdcow_overlay *ov = t->overlay;
	long used, zeroed, peak, refused, errors;
	struct nbdcow_layer *layer;
	struct nbdcow_stats stats;
	unsigned int sz = 0;
	size_t metadata;

	rcu_read_lock();
	layer = rcu_dereference(ov->layer);
	used = atomic_long_read(&layer->used);
	zeroed = atomic_long_read(&layer->map->zeroed);
	metadata = nbdcow_map_bytes(layer->map);
	rcu_read_unlock();
	peak = atomic_long_read(&ov->peak);
	refused = atomic_long_read(&ov->refused);
	errors = atomic_long_read(&ov->base_errors);

	DMEMIT("%s", health_name(t));
	sz = emit_part(result, maxlen, sz, used, READ_ONCE(ov->limit));
	DMEMIT(" %ld %ld %zu %ld %ld", peak, zeroed, metadata, refused, errors);

	sum_stats(ov, &stats);
	sz = emit_part(result, maxlen, sz, atomic_long_read(&t->base->cached),
		       READ_ONCE(t->base->limit));
	DMEMIT(" %lu %lu %ld %lu %lu", stats.hits, stats.misses,
	       atomic_long_read(&t->base->evicted), stats.overlay, stats.base);
	sz = emit_prefetch(&t->prefetch, result, maxlen, sz);
	DMEMIT(" %u %llu", READ_ONCE(t->nr_queued), ov->base_sectors);
}

/**
 * nbdcow_status() - status, table and measurement lines
 * @ti: the target
 * @type: which of them
 * @status_flags: unused; a status needs no flush
 * @result: buffer
 * @maxlen: its size in bytes
 *
 * Context: process context.
 */
void nbdcow_status(struct dm_target *ti, status_type_t type,
		   unsigned int status_flags, char *result, unsigned int maxlen)
{
	struct nbdcow_target *t = ti->private;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		emit_info(t, result, maxlen);
		break;
	case STATUSTYPE_TABLE:
		emit_table(t, result, maxlen);
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",base_device_name=%s;", t->dev->name);
		break;
	}
}

/*
 * Messages
 */

static const char *device_name(struct nbdcow_target *t)
{
	return dm_table_device_name(t->ti->table);
}

static int message_reset(struct nbdcow_target *t, unsigned int argc, char **argv,
			 char *result, unsigned int maxlen)
{
	int ret = nbdcow_overlay_reset(t->overlay);

	if (ret)
		DMERR("%s: reset failed (error %d)", device_name(t), ret);
	return ret;
}

/* "<blocks>" or "none" */
static int limit_argument(struct nbdcow_target *t, char **argv,
			  unsigned long *limit)
{
	*limit = NBDCOW_NO_LIMIT;
	if (!strcasecmp(argv[1], "none") || !nbdcow_parse_limit(argv[1], limit))
		return 0;
	DMERR("%s: %s: expected a number of 4 KiB blocks or none, got %s",
	      device_name(t), argv[0], argv[1]);
	return -EINVAL;
}

static int message_limit(struct nbdcow_target *t, unsigned int argc, char **argv,
			 char *result, unsigned int maxlen)
{
	unsigned long limit;

	if (limit_argument(t, argv, &limit))
		return -EINVAL;
	WRITE_ONCE(t->limit, limit);
	nbdcow_overlay_set_limit(t->overlay, limit);
	return 0;
}

static int message_cache_limit(struct nbdcow_target *t, unsigned int argc,
			       char **argv, char *result, unsigned int maxlen)
{
	unsigned long limit;

	if (limit_argument(t, argv, &limit))
		return -EINVAL;
	nbdcow_base_set_limit(t, limit);
	return 0;
}

/* "on" or "off" */
static int message_switch(struct nbdcow_target *t, unsigned int argc,
			  char **argv, char *result, unsigned int maxlen)
{
	bool *flag = nbdcow_find_flag(t, argv[0]);
	bool on = !strcasecmp(argv[1], "on");

	if (!on && strcasecmp(argv[1], "off")) {
		DMERR("%s: %s: expected on or off, got %s", device_name(t),
		      argv[0], argv[1]);
		return -EINVAL;
	}
	if (flag == &t->queue_errors)
		nbdcow_queue_errors(t, on);
	else
		WRITE_ONCE(*flag, on);
	return 0;
}

static int message_drop_cache(struct nbdcow_target *t, unsigned int argc,
			      char **argv, char *result, unsigned int maxlen)
{
	nbdcow_cache_drop(t->base);
	return 0;
}

/* Two numbers: a block and a number of blocks. */
static int range_argument(struct dm_target *ti, const char *name, char **argv,
			  u64 *block, u64 *count)
{
	if (isdigit(*argv[0]) && !kstrtou64(argv[0], 10, block) &&
	    isdigit(*argv[1]) && !kstrtou64(argv[1], 10, count) && *count)
		return 0;
	DMERR("%s: %s: expected a block and a number of blocks, got %s %s",
	      dm_table_device_name(ti->table), name, argv[0], argv[1]);
	return -EINVAL;
}

/* "stop", or "<block> <blocks> [<KiB per second>]" */
static int message_prefetch(struct nbdcow_target *t, unsigned int argc,
			    char **argv, char *result, unsigned int maxlen)
{
	unsigned int rate = 0;
	u64 block, count;

	if (argc == 2 && !strcasecmp(argv[1], "stop")) {
		nbdcow_prefetch_stop(t);
		return 0;
	}
	if (argc < 3) {
		DMERR("%s: prefetch: expected a block and a number of blocks, or stop, got %s",
		      device_name(t), argv[1]);
		return -EINVAL;
	}
	if (range_argument(t->ti, argv[0], argv + 1, &block, &count))
		return -EINVAL;
	if (argc == 4 && (kstrtouint(argv[3], 10, &rate) || !rate)) {
		DMERR("%s: prefetch: expected a number of KiB per second, got %s",
		      device_name(t), argv[3]);
		return -EINVAL;
	}
	return nbdcow_prefetch_start(t, block, count, rate);
}

/* "<block> <blocks>", many times */
static int message_holes(struct nbdcow_target *t, unsigned int argc, char **argv,
			 char *result, unsigned int maxlen)
{
	u64 block, count;
	unsigned int i;
	int ret;

	for (i = 1; i < argc; i += 2) {
		if (i + 1 == argc) {
			DMERR("%s: holes: expected pairs of numbers",
			      device_name(t));
			return -EINVAL;
		}
		if (range_argument(t->ti, argv[0], argv + i, &block, &count))
			return -EINVAL;
		ret = nbdcow_base_add_hole(t, block, count);
		if (ret) {
			DMERR("%s: holes: %s %s: error %d", device_name(t),
			      argv[i], argv[i + 1], ret);
			return ret;
		}
	}
	return 0;
}

/**
 * nbdcow_extents() - answer a message `extents <block> <blocks>'
 * @ti: the target
 * @argc: number of words
 * @argv: words
 * @result: buffer for the answer
 * @maxlen: its size in bytes
 * @extent: what a block is, as a letter, and for how many that is so
 *
 * The answer is "<blocks><letter>" for each run, as many as fit; the caller goes
 * on behind them.
 *
 * Context: process context, sleeps.
 * Return: 1, -EINVAL for bad arguments, -ERANGE for a block past the end.
 */
int nbdcow_extents(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen,
		   char (*extent)(struct dm_target *ti, u64 block, u64 max,
				  u64 *run))
{
	u64 blocks = DIV_ROUND_UP_ULL(ti->len, NBDCOW_BLOCK_SECTORS);
	u64 block, count, run, length = 0;
	unsigned int sz = 0;
	char kind = 0, last;

	if (range_argument(ti, argv[0], argv + 1, &block, &count))
		return -EINVAL;
	if (block >= blocks) {
		DMERR("%s: extents: the device has %llu blocks, got %s",
		      dm_table_device_name(ti->table), blocks, argv[1]);
		return -ERANGE;
	}
	count = min(count, blocks - block);
	/* The core's buffer for the answer is that of the words: they are gone now. */
	*result = '\0';
	while (count) {
		last = kind;
		kind = extent(ti, block, count, &run);
		if (kind != last && length) {
			/* the longest run, a blank, and the core's reserve */
			if (sz + 64 > maxlen)
				return 1;
			DMEMIT("%llu%c ", length, last);
			length = 0;
		}
		length += run;
		block += run;
		count -= run;
		cond_resched();
	}
	if (sz + 64 <= maxlen)
		DMEMIT("%llu%c", length, kind);
	return 1;
}

static int message_extents(struct nbdcow_target *t, unsigned int argc,
			   char **argv, char *result, unsigned int maxlen)
{
	return nbdcow_extents(t->ti, argc, argv, result, maxlen, nbdcow_extent);
}

static const struct {
	const char *name;
	unsigned int min, max;	/* words, with the name */
	int (*handle)(struct nbdcow_target *t, unsigned int argc, char **argv,
		      char *result, unsigned int maxlen);
} messages[] = {
	{ "reset", 1, 1, message_reset },
	{ "limit", 2, 2, message_limit },
	{ "cache_limit", 2, 2, message_cache_limit },
	{ "cow_on_read", 2, 2, message_switch },
	{ "cow_on_cache", 2, 2, message_switch },
	{ "queue_errors", 2, 2, message_switch },
	{ "drop_cache", 1, 1, message_drop_cache },
	{ "prefetch", 2, 4, message_prefetch },
	{ "holes", 3, UINT_MAX, message_holes },
	{ "extents", 3, 3, message_extents },
};

/**
 * nbdcow_message() - carry a message out
 * @ti: the target
 * @argc: number of words
 * @argv: words
 * @result: buffer for an answer
 * @maxlen: its size in bytes
 *
 * Context: process context, sleeps.
 * Return: 0, or 1 with an answer; -EINVAL for an unknown message or bad arguments; else as the
 *	message's own action.
 */
int nbdcow_message(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(messages); i++) {
		if (strcasecmp(argv[0], messages[i].name))
			continue;
		if (argc < messages[i].min || argc > messages[i].max) {
			DMERR("%s: message %s takes %u arguments, got %u",
			      device_name(ti->private), argv[0],
			      messages[i].min - 1, argc - 1);
			return -EINVAL;
		}
		return messages[i].handle(ti->private, argc, argv, result,
					  maxlen);
	}
	DMERR("%s: unknown message %s", device_name(ti->private), argv[0]);
	return -EINVAL;
}
