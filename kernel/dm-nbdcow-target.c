// SPDX-License-Identifier: GPL-2.0-only
/*
 * dm-nbdcow: a temporary writable copy on top of a read-only block device
 *
 * Design
 * ======
 *
 * Reads of blocks that nobody wrote go to the base device as they are; all
 * that is written stays in a tmpfs file and is thrown away with the device.
 * Where each 4 KiB block lives is said by a sparse map, two bits a block:
 *
 *	state	reads come from			stores
 *	BASE	the base; zeroes past its end	nothing
 *	OVERLAY	the overlay's file		a page
 *	ZERO	nowhere, they are zeroes	nothing
 *
 *	on		BASE		OVERLAY		ZERO
 *	read		remap to base	copy out	zero fill
 *	whole write	install		copy in		install
 *	partial write	read base, then	copy in		install over zeroes
 *			install
 *	discard, zero	-> ZERO		-> ZERO, free	(nothing)
 *	reset		(nothing)	-> BASE, free	-> BASE
 *
 * Installing a block makes it OVERLAY. States change nowhere but in
 * nbdcow_map_change() and nbdcow_map_zero_leaf(); a reset replaces the whole
 * layer, map and file together, and lets a work free the old one.
 *
 * Data path
 * ---------
 * map() runs in the submitter's context and may sleep for locks and memory. It
 * serves blocks that are in RAM one after another and completes the bio. Where a
 * run in state BASE begins, it accepts what is done and lets the core submit the
 * rest as another bio. It never waits for I/O that it has submitted: inside map()
 * that is only queued on current->bio_list, so it would wait for itself. (For a shard
 * lock it may wait until a work that holds it has a page back from swap.) Done
 * elsewhere, therefore, are
 *  - the end of a read of the base that spans a few blocks which are elsewhere,
 *    because that costs less than a request for each part: a work adds them;
 *  - a partial write of a BASE block: rmw.c reads the base and installs the block
 *    from a work, unless the cache has it;
 *  - blocks that are on swap, and writes that found no memory: a work of the bio's
 *    own goes on with it (nbdcow_defer());
 *  - the removal of blocks, since punching may swap in: likewise.
 * Flushes have nothing to do and FUA means nothing: the overlay is volatile on
 * purpose.
 *
 * Under REQ_NOWAIT locks are only tried, memory is allocated with GFP_NOWAIT, and
 * what would sleep ends the bio with BLK_STS_AGAIN. Only the last piece of such a
 * bio may complete asynchronously, see nbdcow_accept_async(). Nothing is polled for.
 *
 * The base
 * --------
 * What is read of the base may fill a cache that all overlays on it share
 * (base.c), which also knows holes of the base. Both are looked at only for
 * blocks in state BASE. With queue_errors, reads of the base that fail wait for
 * its return, or for a table that names another one.
 *
 * Locks, in order
 * ---------------
 *	bases_mutex	the list of bases, and how many targets each has
 *	base->mutex	limit and holes of a base
 *	overlays_mutex	the list of overlays, references
 *	ov->mutex	replacing the layer (reset, growth); event target
 *	shard lock	by leaf; read: install blocks, write: remove them; a
 *			reset, growth, and what a view does hold all of them
 *	installer lock	by 2 MiB: one installs at a time
 *	page lock	serialises writers of a block; keeps reclaim, migration
 *			and removal away; a layer's before a view's
 *	rmw_lock	read-modify-write descriptors of a target; a leaf lock
 *	queue_lock	failed reads of the base that wait; a leaf lock
 *	prefetch lock	what a prefetch is at; a leaf lock
 *	a base's xarray	which blocks are cached, joining a fetch; a leaf lock
 *
 * The layer is read under RCU or any shard lock. All allocations in the I/O path
 * or under a shard lock are GFP_NOIO.
 *
 * Installing a block
 * ------------------
 * Under the shard lock for read and the installer lock: look at the state,
 * reserve the block in the limits, make sure its leaf exists, get the page, lock
 * it. A new page is not zeroed, so it is not up to date before all of the block is
 * in it. Data first (whole block), page up to date and dirty second, state third
 * (release), page lock last, and only then is anybody told. An installer that
 * finds the block OVERLAY adds only its own bytes: its copy of the base is older
 * than what the other one stored. One that finds it ZERO, because a discard came
 * between reading the base and installing, completes it with zeroes.
 *
 * Reading without locks, rewriting with the page lock only
 * -------------------------------------------------------
 * Look the page up and take a reference (a rewrite also tries its lock), then load
 * the state, then copy. What if, before or between these steps,
 *  - the block is discarded: the state changes before the page goes. Found
 *    OVERLAY, the page was the block's; the discard is concurrent, and either
 *    order is right.
 *  - it is discarded and installed anew: the page may be the new one, not yet
 *    filled, but it entered the file only after the discard had changed the
 *    state. OVERLAY at the look then means that it is filled.
 *  - another block of a large page is discarded, the whole page goes with it, and
 *    this block is then installed for the first time, in a new page: the old page
 *    never held it, though the state says OVERLAY. So a reader checks after the state
 *    that the page is still the file's (nbdcow_store_has()); a rewrite has checked
 *    that under the page lock. This is what lets a large page be looked up once for
 *    all blocks of a request.
 *  - the overlay is reset: page and state come from one layer, under RCU.
 *    Nothing is installed in a layer that has been replaced, and its pages are
 *    freed only after a grace period.
 *  - reclaim moves the page to the swap cache: a reader's reference keeps its
 *    content; a rewrite excludes it by the page lock.
 *  - the page migrates: a reader's reference makes the move fail, and a page
 *    that is being moved to is not up to date until it is filled; a rewrite
 *    excludes it by the page lock. A reference alone would lose the bytes that
 *    come between the copy and the freezing of the references.
 *
 * Read-modify-write races
 * -----------------------
 * Between the read of the base and the install anything may happen to the
 * block: whole writes, other partial writes, discards, resets. All are settled
 * by the look at the state under the locks. Partial writes that come while the
 * read is under way join it; the descriptor leaves the hash before the install
 * looks at the state, so that nobody joins too late.
 *
 * Reads that span blocks in several states
 * ----------------------------------------
 * When such a read ends, the bio's pages hold the base's content of all blocks it
 * spans. Only now are states looked at: a block in state BASE keeps what was read,
 * which is right however often it changed before, as the base does not; any other is
 * read as in map(). An error may come from blocks that were read only to bridge a
 * gap, so each run in state BASE is then read again by itself, and only that result
 * counts. A run that is BASE now but was not read, because a reset came in between,
 * is read as well.
 *
 * Views
 * -----
 * A view (view.c) shows the overlay as it was at one instant, while the device
 * goes on. Its freeze holds all shard locks: it copies the map, and keeps the
 * layer from going with a reset. Before a block that was OVERLAY then changes, it is
 * copied to the view's own file, under both page locks, and is "saved" from there on:
 *  - a rewrite with the page lock only looks under it whether a view needs the
 *    block, and if so goes the way through the shard lock. If none does, its bytes are
 *    in the page before any view can lock it: it came before the freeze.
 *  - a rewrite under the shard lock excludes the freeze, and changes the page
 *    only after the block was saved.
 *  - a discard holds the shard lock for write and saves before the state changes.
 *  - a reset leaves the view its layer, which nobody changes any more.
 *  - a reader of a block that is not saved locks the page, and looks again.
 * A rewrite or discard never fails for a view: where a block cannot be saved, the
 * view fails.
 * So at most as many blocks are saved as the overlay had; they count in the total
 * of all overlays, but not in the overlay's limit.
 *
 * Failures
 * --------
 * A new block over a limit, or without memory: that write fails, its block
 * reads as before. A failed read of the base: that request fails, nothing is
 * kept of it. Discards need no space; a whole leaf not even memory. The first
 * error of a bio wins.
 *
 * Objects
 * -------
 * nbdcow_target is a table, which has one line. nbdcow_overlay holds the
 * changes; it is shared by all tables of one mapped device, so that a reload
 * keeps it, and goes with the last of them and of its views. I/O reaches it through
 * one table at a time, since device-mapper suspends the old one first. It fixes the
 * size of the base, so that a base that shrinks gives errors and not zeroes.
 * nbdcow_base is what all targets on one base device share; it goes with the last
 * of them.
 */
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow"

/* Discards and zeroing may be as long as a bio can say. */
#define NBDCOW_MAX_ZERO_SECTORS \
	round_down(UINT_MAX >> SECTOR_SHIFT, NBDCOW_BLOCK_SECTORS)

/*
 * nbdcow_wq: what follows a read of the base, and blocks on swap, on the CPU where that
 * began, so that one thread does many; it waits for swap and memory, never for a base.
 * nbdcow_long_wq: work that may take long. What may hang with a base has a workqueue of
 * that base.
 */
struct workqueue_struct *nbdcow_wq;
struct workqueue_struct *nbdcow_long_wq;

/*
 * Construction
 */

static void nbdcow_dtr(struct dm_target *ti)
{
	struct nbdcow_target *t = ti->private;

	nbdcow_io_exit(t);
	nbdcow_base_exit(t);
	if (t->overlay) {
		nbdcow_overlay_set_event(t->overlay, ti, false);
		nbdcow_overlay_put(t->overlay);
	}
	if (t->dev)
		dm_put_device(ti, t->dev);
	kfree(t);
}

/**
 * nbdcow_find_flag() - find a feature that is on or off
 * @t: the target
 * @name: its name in a table line
 *
 * Context: any.
 * Return: where it is kept, or NULL if there is no such feature.
 */
bool *nbdcow_find_flag(struct nbdcow_target *t, const char *name)
{
	if (!strcasecmp(name, "cow_on_read"))
		return &t->cow_on_read;
	if (!strcasecmp(name, "cow_on_cache"))
		return &t->cow_on_cache;
	return strcasecmp(name, "queue_errors") ? NULL : &t->queue_errors;
}

/* A limit that was not given before. */
static int parse_blocks(const char *value, unsigned long *limit)
{
	return *limit == NBDCOW_NO_LIMIT && value ?
	       nbdcow_parse_limit(value, limit) : -EINVAL;
}

/* Feature arguments; *@tmpfs_dir points into @as. */
static int parse_features(struct dm_arg_set *as, struct nbdcow_target *t,
			  const char **tmpfs_dir, char **error)
{
	static const struct dm_arg args[] = {
		{ 0, 9, "Invalid number of feature arguments" },
	};
	unsigned int left;
	const char *name;
	char *value;
	bool *flag;
	int ret;

	if (!as->argc)
		return 0;
	if (dm_read_arg_group(args, as, &left, error))
		return -EINVAL;
	if (as->argc > left) {
		*error = "More arguments than the number of feature arguments says";
		return -EINVAL;
	}

	while (left) {
		name = dm_shift_arg(as);
		left--;
		flag = nbdcow_find_flag(t, name);
		if (flag) {
			*flag = true;
			continue;
		}
		value = left ? (char *)dm_shift_arg(as) : NULL;
		left -= !!value;
		if (!strcasecmp(name, "limit")) {
			ret = parse_blocks(value, &t->limit);
			*error = "limit takes a number of 4 KiB blocks, at least 1, once";
		} else if (!strcasecmp(name, "cache_limit")) {
			ret = parse_blocks(value, &t->cache_limit);
			*error = "cache_limit takes a number of 4 KiB blocks, at least 1, once";
		} else if (!strcasecmp(name, "tmpfs")) {
			ret = *tmpfs_dir || !value || *value != '/' ?
			      -EINVAL : nbdcow_decode_path(value);
			*error = "tmpfs takes the absolute path of a directory, once";
			*tmpfs_dir = value;
		} else {
			ret = -EINVAL;
			*error = "Unknown feature argument";
		}
		if (ret)
			return ret;
	}
	return 0;
}

static int open_base(struct dm_target *ti, const char *path)
{
	struct nbdcow_target *t = ti->private;
	int ret = dm_get_device(ti, path, BLK_OPEN_READ, &t->dev);

	if (ret == -EBUSY)
		ti->error = "The base device is in use by something that may write to it";
	else if (ret == -EINVAL)	/* newer kernels look for that themselves */
		ti->error = "A device cannot be its own base";
	else if (ret)
		ti->error = "Cannot open the base device";
	if (ret)
		return ret;

	if (t->dev->bdev->bd_dev == t->self->bd_dev) {
		ti->error = "A device cannot be its own base";
		return -EINVAL;
	}
	if (!bdev_nr_sectors(t->dev->bdev)) {
		ti->error = "The base device is empty or not connected";
		return -ENOMEDIUM;
	}
	if (bdev_logical_block_size(t->dev->bdev) > NBDCOW_BLOCK_BYTES) {
		ti->error = "The base device has logical blocks of more than 4096 bytes";
		return -EINVAL;
	}
	return 0;
}

/*
 * <base device> [<#feature args> [<arg>]*]
 *
 *	<base device>	any block device, opened read-only
 *	limit <blocks>	most 4 KiB blocks the overlay may store
 *	tmpfs <dir>	store them on the tmpfs that holds this directory; an
 *			absolute path, blanks and the like as %XX
 *	cow_on_read	keep what is read from the base in its cache
 *	cow_on_cache	keep what is read ahead
 *	cache_limit <blocks>
 *			most 4 KiB blocks the cache of this base may hold
 *	queue_errors	failed reads of the base wait and try again
 */
static int nbdcow_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct dm_arg_set as = { .argc = argc, .argv = argv };
	const char *base_path, *tmpfs_dir = NULL;
	struct nbdcow_overlay *ov;
	struct nbdcow_target *t;
	int ret;

	base_path = dm_shift_arg(&as);
	if (!base_path) {
		ti->error = "No base device given";
		return -EINVAL;
	}
	if (nbdcow_block(ti->len) >= NBDCOW_MAX_BLOCKS) {
		ti->error = "The table is too long";
		return -EFBIG;
	}
	t = kzalloc(sizeof(*t), GFP_KERNEL_ACCOUNT);
	if (!t) {
		ti->error = "Not enough memory";
		return -ENOMEM;
	}
	t->ti = ti;
	t->self = dm_disk(dm_table_get_md(ti->table))->part0;
	t->limit = NBDCOW_NO_LIMIT;
	t->cache_limit = NBDCOW_NO_LIMIT;
	ti->private = t;

	ret = nbdcow_io_init(t);
	if (ret) {
		ti->error = "Not enough memory";
		goto bad;
	}
	ret = parse_features(&as, t, &tmpfs_dir, &ti->error);
	if (ret)
		goto bad;
	ret = open_base(ti, base_path);
	if (ret)
		goto bad;
	ret = nbdcow_base_init(t);
	if (ret) {
		ti->error = "Not enough memory";
		goto bad;
	}
	ov = nbdcow_overlay_get(ti, t->dev->bdev, tmpfs_dir, &ti->error);
	if (IS_ERR(ov)) {
		ret = PTR_ERR(ov);
		goto bad;
	}
	t->overlay = ov;

	ti->num_discard_bios = 1;
	/* One, not duplicates, of which dm_accept_partial_bio() may not take a part. */
	ti->num_write_zeroes_bios = 1;
	ti->discards_supported = true;
	ti->per_io_data_size = sizeof(struct nbdcow_io);
	return 0;

bad:
	nbdcow_dtr(ti);
	return ret;
}

static int nbdcow_preresume(struct dm_target *ti)
{
	struct nbdcow_target *t = ti->private;

	/* The table before this one went on after it was loaded. */
	if (!nbdcow_overlay_set_length(t->overlay, ti->len)) {
		DMERR("%s: the table is shorter than the changes that the overlay holds",
		      dm_table_device_name(ti->table));
		return -EINVAL;
	}
	nbdcow_overlay_set_event(t->overlay, ti, true);
	nbdcow_overlay_set_limit(t->overlay, READ_ONCE(t->limit));
	nbdcow_base_set_limit(t, READ_ONCE(t->cache_limit));
	return 0;
}

static void nbdcow_presuspend(struct dm_target *ti)
{
	nbdcow_queue_close(ti->private, true);
}

static void nbdcow_presuspend_undo(struct dm_target *ti)
{
	nbdcow_queue_close(ti->private, false);
}

static void nbdcow_postsuspend(struct dm_target *ti)
{
	nbdcow_prefetch_pause(ti->private, true);
}

static void nbdcow_resume(struct dm_target *ti)
{
	struct gendisk *disk = dm_disk(dm_table_get_md(ti->table));
	struct nbdcow_target *t = ti->private;

	nbdcow_offer_write_zeroes(disk->queue, NBDCOW_MAX_ZERO_SECTORS);
	nbdcow_queue_close(t, false);
	nbdcow_prefetch_pause(t, false);
}

static int nbdcow_iterate_devices(struct dm_target *ti,
				  iterate_devices_callout_fn fn, void *data)
{
	struct nbdcow_target *t = ti->private;

	return fn(ti, t->dev, 0, min_t(sector_t, ti->len, t->overlay->base_sectors),
		  data);
}

static void nbdcow_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	struct nbdcow_target *t = ti->private;

	/* Whoever uses the device has come to know those of its first base. */
	limits->logical_block_size = max(limits->logical_block_size,
					 t->overlay->base_sector_bytes);
	limits->physical_block_size = max(limits->physical_block_size,
					  NBDCOW_BLOCK_BYTES);
	limits->io_min = max(limits->io_min, NBDCOW_BLOCK_BYTES);
	/* Of the larger physical blocks it must be a multiple, too. */
	limits->io_opt = round_down(limits->io_opt, limits->physical_block_size);
	/* The base splits what it gets by itself. */
	limits->chunk_sectors = 0;
	limits->discard_granularity = NBDCOW_BLOCK_BYTES;
	limits->max_discard_sectors = NBDCOW_MAX_ZERO_SECTORS;
	limits->max_hw_discard_sectors = NBDCOW_MAX_ZERO_SECTORS;
	nbdcow_limits_disinherit(limits);
}

static struct target_type nbdcow_target_type = {
	.name = "nbdcow",
	.version = { 1, 0, 0 },
	/*
	 * Alone in its table: another line that opens the base for writing would make
	 * the core open it anew, for both.
	 */
	.features = DM_TARGET_SINGLETON | DM_TARGET_NOWAIT,
	.module = THIS_MODULE,
	.ctr = nbdcow_ctr,
	.dtr = nbdcow_dtr,
	.map = nbdcow_map,
	.end_io = nbdcow_end_io,
	.presuspend = nbdcow_presuspend,
	.presuspend_undo = nbdcow_presuspend_undo,
	.postsuspend = nbdcow_postsuspend,
	.preresume = nbdcow_preresume,
	.resume = nbdcow_resume,
	.status = nbdcow_status,
	.message = nbdcow_message,
	.iterate_devices = nbdcow_iterate_devices,
	.io_hints = nbdcow_io_hints,
};

/*
 * Module
 */

static char total_limit[32] = "50%";

static int total_limit_set(const char *value, const struct kernel_param *kp)
{
	unsigned long long number, blocks;
	char text[sizeof(total_limit)], *end;

	if (strscpy(text, value, sizeof(text)) < 0)
		return -EINVAL;
	strim(text);
	number = memparse(text, &end);
	if (!strcmp(text, "none")) {
		blocks = NBDCOW_NO_LIMIT;
	} else if (end == text) {
		return -EINVAL;
	} else if (!strcmp(end, "%") && number <= 1000) {
		blocks = div_u64((u64)totalram_pages() << PAGE_SHIFT, 100) *
			 number >> NBDCOW_BLOCK_SHIFT;
	} else if (!*end) {
		blocks = number >> NBDCOW_BLOCK_SHIFT;
	} else {
		return -EINVAL;
	}

	strscpy(total_limit, text, sizeof(total_limit));
	nbdcow_overlay_set_total(min_t(u64, blocks, NBDCOW_NO_LIMIT));
	return 0;
}

static const struct kernel_param_ops total_limit_ops = {
	.set = total_limit_set,
	.get = param_get_string,
};

static int total_used_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%ld\n", atomic_long_read(&nbdcow_total_used));
}

static const struct kernel_param_ops total_used_ops = {
	.get = total_used_get,
};

static struct kparam_string total_limit_string = {
	.maxlen = sizeof(total_limit),
	.string = total_limit,
};

module_param_cb(total_limit, &total_limit_ops, &total_limit_string, 0644);
MODULE_PARM_DESC(total_limit,
		 "Most that all overlays together may store: bytes with K, M, G or T, a percentage of the RAM, or none (default 50%)");
module_param_cb(total_used, &total_used_ops, NULL, 0444);
MODULE_PARM_DESC(total_used, "4 KiB blocks that all overlays together store");

static void destroy_queues(void)
{
	if (nbdcow_long_wq)
		destroy_workqueue(nbdcow_long_wq);
	if (nbdcow_wq)
		destroy_workqueue(nbdcow_wq);
}

static int __init nbdcow_init(void)
{
	int ret;

	if (!nbdcow_total_limit)
		total_limit_set(total_limit, NULL);

	ret = nbdcow_map_init();
	if (ret)
		return ret;
	ret = nbdcow_shrinker_init();
	if (ret)
		goto bad_map;
	nbdcow_wq = alloc_workqueue("nbdcow", WQ_MEM_RECLAIM | WQ_PERCPU, 0);
	nbdcow_long_wq = alloc_workqueue("nbdcow_long",
					 WQ_MEM_RECLAIM | WQ_UNBOUND, 0);
	if (!nbdcow_wq || !nbdcow_long_wq) {
		ret = -ENOMEM;
		goto bad_wq;
	}
	ret = dm_register_target(&nbdcow_view_type);
	if (ret)
		goto bad_wq;
	ret = dm_register_target(&nbdcow_target_type);
	if (ret)
		goto bad_view;
	return 0;

bad_view:
	dm_unregister_target(&nbdcow_view_type);
bad_wq:
	destroy_queues();
	nbdcow_shrinker_exit();
bad_map:
	nbdcow_map_exit();
	return ret;
}

static void __exit nbdcow_exit(void)
{
	dm_unregister_target(&nbdcow_target_type);
	dm_unregister_target(&nbdcow_view_type);
	destroy_queues();
	nbdcow_shrinker_exit();
	nbdcow_map_exit();
}

module_init(nbdcow_init);
module_exit(nbdcow_exit);

MODULE_DESCRIPTION("device-mapper temporary writable copy of a read-only device");
MODULE_AUTHOR("The dm-nbdcow developers");
MODULE_LICENSE("GPL");
