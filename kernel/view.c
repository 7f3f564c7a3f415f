// SPDX-License-Identifier: GPL-2.0-only
/*
 * The target nbdcow-view: a read-only device that shows what a copy held at the
 * instant of the view's first resume. How it stays so is in overlay.c and in the
 * design comment of dm-nbdcow-target.c.
 */
#include <linux/slab.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow-view"

struct view_target {
	struct dm_target *ti;	/* its device-mapper side */
	struct dm_dev *base;	/* the base of the copy, opened read-only */
	dev_t dev;		/* the copy, which may be gone by now */
	struct nbdcow_view *view; /* what it held */
};

/* Beside each bio. */
struct view_io {
	struct work_struct work; /* reads stored blocks */
	struct view_target *v;	/* whose bio it is */
};

static void view_work(struct work_struct *work)
{
	struct view_io *io = container_of(work, struct view_io, work);
	struct bio *bio = dm_bio_from_per_bio_data(io, sizeof(*io));
	struct bvec_iter iter = bio->bi_iter;
	struct nbdcow_piece piece;
	int ret = 0;

	while (iter.bi_size && !ret) {
		nbdcow_piece_init(&piece, io->v->ti, bio, iter);
		ret = nbdcow_view_read(io->v->view, &piece);
		iter = piece.iter;
		cond_resched();
	}
	nbdcow_bio_complete(bio, ret);
}

static int view_map(struct dm_target *ti, struct bio *bio)
{
	sector_t sector = dm_target_offset(ti, bio->bi_iter.bi_sector), left;
	unsigned int n = bio_sectors(bio), skip = sector % NBDCOW_BLOCK_SECTORS;
	struct view_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct view_target *v = ti->private;
	enum nbdcow_state state;
	struct bvec_iter iter;
	u64 run;

	if (bio_op(bio) != REQ_OP_READ)
		return DM_MAPIO_KILL;

	state = nbdcow_map_run(v->view->states, nbdcow_block(sector),
			       DIV_ROUND_UP(skip + n, NBDCOW_BLOCK_SECTORS), &run);
	n = min_t(u64, n, run * NBDCOW_BLOCK_SECTORS - skip);
	if (state == NBDCOW_BASE) {
		left = v->view->overlay->base_sectors;
		if (sector >= left)
			state = NBDCOW_ZERO;
		else
			n = min_t(sector_t, n, left - sector);
	}
	if (n < bio_sectors(bio))
		dm_accept_partial_bio(bio, n);

	switch (state) {
	case NBDCOW_BASE:
		bio_set_dev(bio, v->base->bdev);
		bio->bi_iter.bi_sector = sector;
		return DM_MAPIO_REMAPPED;
	case NBDCOW_OVERLAY:
		io->v = v;
		INIT_WORK(&io->work, view_work);
		queue_work(nbdcow_long_wq, &io->work);
		return DM_MAPIO_SUBMITTED;
	default:
		iter = bio->bi_iter;
		nbdcow_zero_bio(bio, &iter, n << SECTOR_SHIFT);
		nbdcow_bio_complete(bio, 0);
		return DM_MAPIO_SUBMITTED;
	}
}

static void view_dtr(struct dm_target *ti)
{
	struct view_target *v = ti->private;

	if (v->view)
		nbdcow_view_destroy(v->view);
	if (v->base)
		dm_put_device(ti, v->base);
	kfree(v);
}

/* A device is named by its numbers or its path. */
static int find_device(const char *name, dev_t *dev)
{
	unsigned int major, minor;
	char more;

	if (sscanf(name, "%u:%u%c", &major, &minor, &more) != 2)
		return lookup_bdev(name, dev);
	*dev = MKDEV(major, minor);
	return MAJOR(*dev) == major && MINOR(*dev) == minor ? 0 : -EOVERFLOW;
}

/*
 * <device> <base device>
 *
 *	<device>	with an nbdcow table, at least as long
 *	<base device>	as in that table
 */
static int view_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct view_target *v;
	int ret;

	if (argc != 2) {
		ti->error = "Two devices are needed: the one to view, and its base";
		return -EINVAL;
	}
	if (dm_table_get_mode(ti->table) & BLK_OPEN_WRITE) {
		ti->error = "A view is read-only";
		return -EROFS;
	}
	v = kzalloc(sizeof(*v), GFP_KERNEL_ACCOUNT);
	if (!v) {
		ti->error = "Not enough memory";
		return -ENOMEM;
	}
	v->ti = ti;
	ti->private = v;

	ret = find_device(argv[0], &v->dev);
	if (ret) {
		ti->error = "The device to view does not exist";
		goto bad;
	}
	ret = dm_get_device(ti, argv[1], BLK_OPEN_READ, &v->base);
	if (ret) {
		ti->error = "Cannot open the base device";
		goto bad;
	}
	if (v->base->bdev->bd_disk == dm_disk(dm_table_get_md(ti->table))) {
		ti->error = "A device cannot be its own base";
		ret = -EINVAL;
		goto bad;
	}
	v->view = nbdcow_view_create(v->dev, ti->len, &ti->error);
	if (IS_ERR(v->view)) {
		ret = PTR_ERR(v->view);
		v->view = NULL;
		goto bad;
	}
	ti->per_io_data_size = sizeof(struct view_io);
	return 0;

bad:
	view_dtr(ti);
	return ret;
}

static int view_preresume(struct dm_target *ti)
{
	struct view_target *v = ti->private;

	return nbdcow_view_freeze(v->view);
}

static void view_status(struct dm_target *ti, status_type_t type,
			unsigned int status_flags, char *result,
			unsigned int maxlen)
{
	struct view_target *v = ti->private;
	struct nbdcow_view *view = v->view;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		DMEMIT("%s %ld", READ_ONCE(view->failed) ? "failed" :
		       READ_ONCE(view->layer) ? "ok" : "new",
		       atomic_long_read(&view->nr_saved));
		break;
	case STATUSTYPE_TABLE:
		DMEMIT("%u:%u %s", MAJOR(v->dev), MINOR(v->dev), v->base->name);
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",base_device_name=%s;", v->base->name);
		break;
	}
}

/* As a message of nbdcow; holes and the end of the base are its own business. */
static char view_extent(struct dm_target *ti, u64 block, u64 max, u64 *run)
{
	struct view_target *v = ti->private;

	switch (nbdcow_map_run(v->view->states, block, max, run)) {
	case NBDCOW_OVERLAY:
		return 'o';
	case NBDCOW_ZERO:
		return 'z';
	default:
		return 'b';
	}
}

static int view_message(struct dm_target *ti, unsigned int argc, char **argv,
			char *result, unsigned int maxlen)
{
	struct view_target *v = ti->private;
	bool frozen;

	/* Pairs with the release in nbdcow_view_freeze(): states are there. */
	frozen = smp_load_acquire(&v->view->layer);
	if (frozen && argc == 3 && !strcasecmp(argv[0], "extents"))
		return nbdcow_extents(ti, argc, argv, result, maxlen,
				      view_extent);
	DMERR("%s: expected extents <block> <blocks>, after the first resume",
	      dm_table_device_name(ti->table));
	return -EINVAL;
}

static int view_iterate_devices(struct dm_target *ti,
				iterate_devices_callout_fn fn, void *data)
{
	struct view_target *v = ti->private;

	return fn(ti, v->base, 0,
		  min_t(sector_t, ti->len, v->view->overlay->base_sectors), data);
}

static void view_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	nbdcow_limits_disinherit(limits);
}

struct target_type nbdcow_view_type = {
	.name = "nbdcow-view",
	.version = { 1, 0, 0 },
	.features = DM_TARGET_SINGLETON,
	.module = THIS_MODULE,
	.ctr = view_ctr,
	.dtr = view_dtr,
	.map = view_map,
	.preresume = view_preresume,
	.status = view_status,
	.message = view_message,
	.iterate_devices = view_iterate_devices,
	.io_hints = view_io_hints,
};
