// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reading the base on the overlay's behalf: read-modify-write of blocks that
 * are written in part before they are stored.
 *
 * Each block in work has one descriptor, found by a hash; further partial
 * writes to it join while its read is under way. The descriptors are bounded:
 * a bio that finds none waits in a list, and whoever frees one starts it, so
 * that map() never waits. One is kept in reserve, so that the list always moves.
 */
#include <linux/hash.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>

#include "compat.h"
#include "nbdcow.h"

struct nbdcow_rmw {
	struct hlist_node node;	/* in rmw_hash while bios may join */
	struct nbdcow_target *t; /* whose base is read */
	u64 block;		/* which block is read */
	struct bio_list bios;	/* partial writes to it; under rmw_lock */
	struct work_struct work; /* installs the block */
	struct page *page;	/* the base's content */
	struct bio_vec bvec;	/* of bio */
	struct bio bio;		/* reads the base */
};

static struct hlist_head *bucket(struct nbdcow_target *t, u64 block)
{
	return &t->rmw_hash[hash_64(block, NBDCOW_RMW_HASH_BITS)];
}

static sector_t first_sector(const struct nbdcow_rmw *rmw)
{
	return rmw->block * NBDCOW_BLOCK_SECTORS;
}

/* How much of the block the base has; the rest reads as zeroes. */
static unsigned int base_bytes(const struct nbdcow_rmw *rmw)
{
	sector_t left = rmw->t->overlay->base_sectors - first_sector(rmw);

	return min_t(sector_t, left, NBDCOW_BLOCK_SECTORS) << SECTOR_SHIFT;
}

static void rmw_endio(struct bio *bio)
{
	struct nbdcow_rmw *rmw = container_of(bio, struct nbdcow_rmw, bio);

	/* Only after a success nothing is read again. */
	queue_work(bio->bi_status ? rmw->t->base->wq : nbdcow_wq, &rmw->work);
}

static void rmw_read(struct nbdcow_rmw *rmw, blk_opf_t flags)
{
	bio_init(&rmw->bio, rmw->t->dev->bdev, &rmw->bvec, 1,
		 REQ_OP_READ | flags);
	rmw->bio.bi_iter.bi_sector = first_sector(rmw);
	rmw->bio.bi_end_io = rmw_endio;
	__bio_add_page(&rmw->bio, rmw->page, base_bytes(rmw), 0);
	submit_bio_noacct(&rmw->bio);
}

/* The base's content is there: let every partial write add its own bytes. */
static void rmw_install(struct nbdcow_rmw *rmw, struct bio_list *bios)
{
	void *base = page_address(rmw->page);
	unsigned int bytes = base_bytes(rmw);
	struct nbdcow_piece piece;
	struct bio *bio;
	int ret;

	memset(base + bytes, 0, NBDCOW_BLOCK_BYTES - bytes);
	while ((bio = bio_list_pop(bios))) {
		nbdcow_piece_init(&piece, rmw->t->ti, bio, bio->bi_iter);
		piece.base = base;
		ret = nbdcow_overlay_wait(rmw->t->overlay, &piece,
					  nbdcow_overlay_write);
		nbdcow_bio_complete(bio, ret);
	}
}

static void rmw_free(struct nbdcow_rmw *rmw)
{
	struct nbdcow_target *t = rmw->t;

	if (rmw->page)
		mempool_free(rmw->page, &t->rmw_pages);
	mempool_free(rmw, &t->rmw_pool);
}

static void rmw_work(struct work_struct *work)
{
	struct nbdcow_rmw *rmw = container_of(work, struct nbdcow_rmw, work);
	struct nbdcow_target *t = rmw->t;
	blk_status_t status = rmw->bio.bi_status;
	struct bio_list bios;
	struct bio *bio;
	bool idle;

	bio_uninit(&rmw->bio);
	if (status == BLK_STS_AGAIN && rmw->bio.bi_opf & REQ_NOWAIT) {
		rmw_read(rmw, 0);
		return;
	}
	nbdcow_base_done(t, status);

	/* Nobody may join from here on: the block's state decides instead. */
	spin_lock(&t->rmw_lock);
	hlist_del(&rmw->node);
	bios = rmw->bios;
	spin_unlock(&t->rmw_lock);

	if (status) {
		while ((bio = bio_list_pop(&bios)))
			nbdcow_base_failed(t, bio, status);
	} else {
		if (READ_ONCE(t->cow_on_read) &&
		    base_bytes(rmw) == NBDCOW_BLOCK_BYTES)
			nbdcow_cache_add(t->base, rmw->block,
					 page_address(rmw->page));
		rmw_install(rmw, &bios);
	}

	spin_lock(&t->rmw_lock);
	rmw_free(rmw);
	bio = bio_list_pop(&t->rmw_waiting);
	WRITE_ONCE(t->rmw_inflight, t->rmw_inflight - 1);
	idle = !t->rmw_inflight && !bio;
	spin_unlock(&t->rmw_lock);
	if (bio) {
		nbdcow_defer(t, bio);
	} else if (idle) {
		smp_mb();	/* inflight before the look for who waits */
		wake_up_var(&t->rmw_inflight);	/* t may be gone: only a key */
	}
}

static struct nbdcow_rmw *rmw_alloc(struct nbdcow_target *t)
{
	struct nbdcow_rmw *rmw;

	lockdep_assert_held(&t->rmw_lock);

	if (t->rmw_inflight >= NBDCOW_RMW_MAX)
		return NULL;
	rmw = mempool_alloc(&t->rmw_pool, GFP_NOWAIT | __GFP_NOWARN);
	if (!rmw)
		return NULL;
	rmw->t = t;
	rmw->page = mempool_alloc(&t->rmw_pages, GFP_NOWAIT | __GFP_NOWARN);
	if (!rmw->page) {
		rmw_free(rmw);
		return NULL;
	}
	WRITE_ONCE(t->rmw_inflight, t->rmw_inflight + 1);
	return rmw;
}

/**
 * nbdcow_rmw_next() - go on with a bio that waits for a descriptor, if any
 * @t: the target, kept alive by a bio of the caller
 *
 * For a bio that came from the waiting list and needed no descriptor after all.
 *
 * Context: process context.
 */
void nbdcow_rmw_next(struct nbdcow_target *t)
{
	struct bio *bio;

	spin_lock(&t->rmw_lock);
	bio = bio_list_pop(&t->rmw_waiting);
	spin_unlock(&t->rmw_lock);
	if (bio)
		nbdcow_defer(t, bio);
}

/**
 * nbdcow_rmw_submit() - write a part of a block that is in state BASE
 * @t: the target
 * @bio: a WRITE or WRITE_ZEROES that lies within one block; completed later
 * @in_work: outside of map(), where to submit a bio can mean waiting for the base
 *
 * Context: process context; does not wait for I/O or memory.
 */
void nbdcow_rmw_submit(struct nbdcow_target *t, struct bio *bio, bool in_work)
{
	sector_t sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	u64 block = nbdcow_block(sector);
	struct nbdcow_rmw *rmw;
	struct bio *next;

	spin_lock(&t->rmw_lock);
	hlist_for_each_entry(rmw, bucket(t, block), node) {
		if (rmw->block == block) {
			bio_list_add(&rmw->bios, bio);
			next = bio_list_pop(&t->rmw_waiting);
			spin_unlock(&t->rmw_lock);
			if (next)
				nbdcow_defer(t, next);
			return;
		}
	}
	rmw = rmw_alloc(t);
	if (!rmw) {
		/* Others are under way, or the reserve would have served. */
		bio_list_add(&t->rmw_waiting, bio);
		spin_unlock(&t->rmw_lock);
		return;
	}
	rmw->block = block;
	bio_list_init(&rmw->bios);
	bio_list_add(&rmw->bios, bio);
	INIT_WORK(&rmw->work, rmw_work);
	hlist_add_head(&rmw->node, bucket(t, block));
	spin_unlock(&t->rmw_lock);

	if (in_work) {
		/* as if that had been tried */
		bio_init(&rmw->bio, NULL, NULL, 0, REQ_OP_READ | REQ_NOWAIT);
		rmw->bio.bi_status = BLK_STS_AGAIN;
		rmw_endio(&rmw->bio);
		return;
	}
	rmw_read(rmw, bio->bi_opf & REQ_NOWAIT);
}

/**
 * nbdcow_rmw_init() - prepare read-modify-write
 * @t: the target, zeroed
 *
 * Context: process context, sleeps.
 * Return: 0 or -ENOMEM; nbdcow_rmw_exit() is due in both cases.
 */
int nbdcow_rmw_init(struct nbdcow_target *t)
{
	int ret;

	spin_lock_init(&t->rmw_lock);
	bio_list_init(&t->rmw_waiting);
	ret = mempool_init_kmalloc_pool(&t->rmw_pool, NBDCOW_RMW_RESERVE,
					sizeof(struct nbdcow_rmw));
	if (ret)
		return ret;
	return mempool_init_page_pool(&t->rmw_pages, NBDCOW_RMW_RESERVE, 0);
}

/**
 * nbdcow_rmw_exit() - wait for the last descriptor, free the reserve
 * @t: the target, without I/O in flight
 *
 * Context: process context, sleeps.
 */
void nbdcow_rmw_exit(struct nbdcow_target *t)
{
	/* A work may still be between the end of its bios and its own. */
	wait_var_event(&t->rmw_inflight, !READ_ONCE(t->rmw_inflight));
	/* And the last one may still be unlocking. */
	spin_lock(&t->rmw_lock);
	spin_unlock(&t->rmw_lock);
	mempool_exit(&t->rmw_pages);
	mempool_exit(&t->rmw_pool);
}
