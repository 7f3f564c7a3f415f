// SPDX-License-Identifier: GPL-2.0-only
/*
 * What becomes of a bio: in map(), in the works that go on with it, and when the
 * base has answered. The rules are in the design comment of dm-nbdcow-target.c.
 */
#include "compat.h"
#include "nbdcow.h"

/* To read this many sectors that are not needed costs less than a second request. */
#define NBDCOW_SPAN_SECTORS	(4 * NBDCOW_BLOCK_SECTORS)

/* How long failed reads of the base wait before one tries again. */
#define NBDCOW_RETRY_PAUSE	HZ

/**
 * nbdcow_bio_complete() - end a bio that map() took over
 * @bio: the bio
 * @error: 0 or -errno
 *
 * Context: any.
 */
void nbdcow_bio_complete(struct bio *bio, int error)
{
	if (unlikely(error))
		bio->bi_status = errno_to_blk_status(error);
	bio_endio(bio);
}

/**
 * nbdcow_base_done() - take note of how a read of the base ended
 * @t: the target
 * @status: its status
 *
 * User space is told when the base begins to fail, and when it is back.
 *
 * Context: any.
 */
void nbdcow_base_done(struct nbdcow_target *t, blk_status_t status)
{
	bool failed = READ_ONCE(t->base_failed);

	if (unlikely(status))
		atomic_long_inc(&t->overlay->base_errors);
	if (likely(failed == !!status))
		return;
	WRITE_ONCE(t->base_failed, !failed);
	nbdcow_overlay_event(t->overlay);
}

/**
 * nbdcow_piece_init() - the first piece of what is left of a bio
 * @piece: set up to cover the rest of one block, or of the bio
 * @ti: the target
 * @bio: the bio
 * @iter: from where on
 *
 * Context: any.
 */
void nbdcow_piece_init(struct nbdcow_piece *piece, struct dm_target *ti,
		       struct bio *bio, struct bvec_iter iter)
{
	sector_t sector = dm_target_offset(ti, iter.bi_sector);

	piece->bio = bio;
	piece->iter = iter;
	piece->block = nbdcow_block(sector);
	piece->offset = (sector % NBDCOW_BLOCK_SECTORS) << SECTOR_SHIFT;
	piece->bytes = min(NBDCOW_BLOCK_BYTES - piece->offset, iter.bi_size);
	piece->base = NULL;
	piece->base_is_zero = false;
	piece->context = bio->bi_opf & REQ_NOWAIT ? NBDCOW_NOWAIT : NBDCOW_MAP;
	piece->new_block = false;
}

/*
 * The data path
 */

/* The state at a sector, and how many sectors from there on share it. */
static enum nbdcow_state state_at(struct nbdcow_target *t, sector_t sector,
				  unsigned int max, unsigned int *sectors)
{
	unsigned int skip = sector % NBDCOW_BLOCK_SECTORS;
	sector_t base_sectors = t->overlay->base_sectors;
	enum nbdcow_state state;
	u64 run;

	state = nbdcow_overlay_state(t->overlay, nbdcow_block(sector),
				     DIV_ROUND_UP(skip + max,
						  NBDCOW_BLOCK_SECTORS), &run);
	*sectors = min_t(u64, max, run * NBDCOW_BLOCK_SECTORS - skip);
	if (state != NBDCOW_BASE)
		return state;
	if (sector >= base_sectors)
		return NBDCOW_ZERO;
	*sectors = min_t(sector_t, *sectors, base_sectors - sector);
	if (likely(!rcu_access_pointer(t->base->holes)))
		return NBDCOW_BASE;
	if (nbdcow_base_hole(t->base, nbdcow_block(sector), run, &run))
		state = NBDCOW_ZERO;
	*sectors = min_t(u64, *sectors, run * NBDCOW_BLOCK_SECTORS - skip);
	return state;
}

/**
 * nbdcow_extent() - where a block lives, and for how long that lasts
 * @ti: the target
 * @block: first block
 * @max: most blocks that the caller cares for
 * @run: set to the number of blocks for which the answer is the same
 *
 * Context: any.
 * Return: b for the base, h for a known hole of the base, o for the overlay, z
 *	for zeroes of the overlay's or past the end of the base.
 */
char nbdcow_extent(struct dm_target *ti, u64 block, u64 max, u64 *run)
{
	struct nbdcow_target *t = ti->private;
	u64 base_blocks = DIV_ROUND_UP_ULL(t->overlay->base_sectors,
					   NBDCOW_BLOCK_SECTORS);

	switch (nbdcow_overlay_state(t->overlay, block, max, run)) {
	case NBDCOW_OVERLAY:
		return 'o';
	case NBDCOW_ZERO:
		return 'z';
	default:
		if (block >= base_blocks)
			return 'z';
		*run = min(*run, base_blocks - block);
		return nbdcow_base_hole(t->base, block, *run, run) ? 'h' : 'b';
	}
}

/* The first @sectors of a bio are done or taken; let the core send the rest. */
static void accept_sectors(struct bio *bio, unsigned int sectors)
{
	if (sectors < bio_sectors(bio))
		dm_accept_partial_bio(bio, sectors);
}

/**
 * nbdcow_accept_async() - take the first part of a bio, to complete it later
 * @bio: the bio
 * @sectors: how much of it
 *
 * Under REQ_NOWAIT only the last piece of a bio may become asynchronous. If a
 * later one ended with an error, EAGAIN for one, then the whole would end in a
 * context in which io_uring does not repeat it, but hands the EAGAIN on.
 *
 * Context: any, from map().
 * Return: false, with nothing done, if REQ_NOWAIT forbids.
 */
bool nbdcow_accept_async(struct bio *bio, unsigned int sectors)
{
	if (bio->bi_opf & REQ_NOWAIT && sectors < bio_sectors(bio))
		return false;
	accept_sectors(bio, sectors);
	return true;
}

static int finish_bio(struct bio *bio, int error)
{
	nbdcow_bio_complete(bio, error);
	return DM_MAPIO_SUBMITTED;
}

static void count_read(unsigned long __percpu *from, unsigned int sectors)
{
	this_cpu_add(*from, sectors);
}

/* Keep what it takes to go on with a read when the base has done its part. */
static struct nbdcow_io *remember_read(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));

	io->t = t;
	io->iter = bio->bi_iter;
	io->flags = bio->bi_flags;
	io->mixed = false;
	io->spans = false;
	bio->bi_private = io;
	return io;
}

static void remap_to_base(struct nbdcow_target *t, struct bio *bio)
{
	if (unlikely(READ_ONCE(t->queue_errors)) && !bio->bi_private)
		remember_read(t, bio);	/* may be tried again */
	count_read(&t->overlay->stats->base, bio_sectors(bio));
	bio_set_dev(bio, t->dev->bdev);
	bio->bi_iter.bi_sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
}

/**
 * nbdcow_read_base() - send a read to the base, outside of map()
 * @bio: the read, with its target beside it
 *
 * Context: process context.
 */
void nbdcow_read_base(struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));

	bio->bi_opf &= ~REQ_NOWAIT;
	remap_to_base(io->t, bio);
	submit_bio_noacct(bio);
}

/* Copy what the cache has of the next @sectors; how many that was. */
static unsigned int read_cached(struct nbdcow_target *t, struct bio *bio,
				struct bvec_iter *iter, unsigned int sectors)
{
	struct nbdcow_piece piece;
	unsigned int done = 0;
	struct page *page;

	while (done < sectors) {
		nbdcow_piece_init(&piece, t->ti, bio, *iter);
		piece.bytes = min(piece.bytes, (sectors - done) << SECTOR_SHIFT);
		page = nbdcow_cache_find(t->base, piece.block);
		if (!page)
			break;
		nbdcow_copy_from_page(&piece, page);
		put_page(page);
		*iter = piece.iter;
		done += piece.bytes >> SECTOR_SHIFT;
	}
	if (done)
		count_read(&t->overlay->stats->hits, done);
	return done;
}

static bool fills_cache(struct nbdcow_target *t, struct bio *bio)
{
	return READ_ONCE(t->cow_on_read) ||
	       (bio->bi_opf & REQ_RAHEAD && READ_ONCE(t->cow_on_cache));
}

static bool uses_cache(struct nbdcow_target *t, struct bio *bio)
{
	return atomic_long_read(&t->base->cached) || fills_cache(t, bio);
}

/*
 * Read *@sectors in state BASE, the first of which are not cached: through the
 * cache, or -ENOENT where the base is to be read as far as then in *@sectors.
 */
static int map_uncached(struct nbdcow_target *t, struct bio *bio,
			unsigned int *sectors)
{
	sector_t sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	unsigned int skip = sector % NBDCOW_BLOCK_SECTORS;
	u64 gap = nbdcow_cache_gap(t->base, nbdcow_block(sector),
				   DIV_ROUND_UP(skip + *sectors,
						NBDCOW_BLOCK_SECTORS));
	int ret;

	/* Without a gap the block is being read, or was a moment ago. */
	if (!gap || fills_cache(t, bio)) {
		ret = nbdcow_cache_fetch(t, bio, *sectors);
		if (ret == -EAGAIN)
			return finish_bio(bio, ret);
		if (ret != -ENOENT)
			return ret;
	}
	*sectors = min_t(u64, *sectors,
			 max(gap, 1ULL) * NBDCOW_BLOCK_SECTORS - skip);
	return -ENOENT;
}

/*
 * How far to read the base in one go, when *@sectors from @sector on are in state
 * BASE: on across short gaps, but no more in vain than is needed.
 */
static unsigned int span_gaps(struct nbdcow_target *t, sector_t sector,
			      unsigned int sectors, unsigned int max)
{
	unsigned int spare = sectors, end = sectors, at = sectors, n;

	max = min_t(sector_t, max, t->overlay->base_sectors - sector);
	for (; at < max; at += n) {
		if (state_at(t, sector + at, max - at, &n) == NBDCOW_BASE) {
			spare += n;
			end = at + n;
			continue;
		}
		if (n > min(spare, NBDCOW_SPAN_SECTORS))
			return end;
		spare -= n;
	}
	return max;
}

/* Go on with a read outside of map(), the base has none of it yet. */
static int defer_read(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_io *io = remember_read(t, bio);

	io->mixed = true;
	io->got = 0;
	return nbdcow_defer(t, bio);
}

/* Have the base read @sectors, the first @sure of which are in state BASE. */
static int map_base(struct nbdcow_target *t, struct bio *bio,
		    unsigned int sectors, unsigned int sure)
{
	struct nbdcow_io *io;

	if (!nbdcow_accept_async(bio, sectors))
		return finish_bio(bio, -EAGAIN);
	if (sectors > sure) {
		io = remember_read(t, bio);
		io->mixed = true;
		io->spans = true;
		io->got = bio->bi_iter.bi_size;
	}
	remap_to_base(t, bio);
	return DM_MAPIO_REMAPPED;
}

static int map_read(struct nbdcow_target *t, struct bio *bio)
{
	sector_t sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	unsigned int total = bio_sectors(bio), done = 0, n, cached;
	struct bvec_iter iter = bio->bi_iter;
	struct nbdcow_piece piece;
	bool use_cache;
	int ret;

	while (done < total) {
		switch (state_at(t, dm_target_offset(t->ti, iter.bi_sector),
				 total - done, &n)) {
		case NBDCOW_BASE:
			use_cache = uses_cache(t, bio);
			if (unlikely(use_cache)) {
				cached = read_cached(t, bio, &iter, n);
				done += cached;
				if (cached)
					break;
			}
			if (done)
				goto out;
			if (unlikely(use_cache)) {
				ret = map_uncached(t, bio, &n);
				if (ret == -ESTALE)	/* cached by now */
					break;
				if (ret != -ENOENT)
					return ret;
				return map_base(t, bio, n, n);
			}
			return map_base(t, bio, span_gaps(t, sector, n, total), n);
		case NBDCOW_ZERO:
			nbdcow_zero_bio(bio, &iter, n << SECTOR_SHIFT);
			done += n;
			break;
		case NBDCOW_OVERLAY:
			nbdcow_piece_init(&piece, t->ti, bio, iter);
			n = nbdcow_overlay_copy(t->overlay, &piece,
						n << SECTOR_SHIFT);
			if (likely(n)) {
				n >>= SECTOR_SHIFT;
				count_read(&t->overlay->stats->overlay, n);
				iter = piece.iter;
				done += n;
				break;
			}
			ret = nbdcow_overlay_read(t->overlay, &piece);
			if (ret == -ESTALE)	/* discarded or reset */
				break;
			if (ret == -EINPROGRESS) {
				if (done)
					goto out;
				n = piece.bytes >> SECTOR_SHIFT;
				if (!nbdcow_accept_async(bio, n))
					return finish_bio(bio, -EAGAIN);
				return defer_read(t, bio);
			}
			if (ret)
				return finish_bio(bio, ret);
			count_read(&t->overlay->stats->overlay,
				   piece.bytes >> SECTOR_SHIFT);
			iter = piece.iter;
			done += piece.bytes >> SECTOR_SHIFT;
			break;
		}
	}
out:
	accept_sectors(bio, done);
	return finish_bio(bio, 0);
}

/* A read of one block, that being what most are; otherwise map_read() does it. */
static int map_read_block(struct nbdcow_target *t, struct bio *bio)
{
	sector_t sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	unsigned int n = bio_sectors(bio);

	if (sector % NBDCOW_BLOCK_SECTORS + n > NBDCOW_BLOCK_SECTORS)
		return map_read(t, bio);

	switch (nbdcow_overlay_block(t->overlay, nbdcow_block(sector))) {
	case NBDCOW_BASE:
		if (sector + n > t->overlay->base_sectors ||
		    uses_cache(t, bio) || rcu_access_pointer(t->base->holes))
			break;
		remap_to_base(t, bio);
		return DM_MAPIO_REMAPPED;
	case NBDCOW_OVERLAY: {
		struct nbdcow_piece piece;

		nbdcow_piece_init(&piece, t->ti, bio, bio->bi_iter);
		if (!nbdcow_overlay_copy(t->overlay, &piece, piece.bytes))
			break;
		count_read(&t->overlay->stats->overlay, n);
		return finish_bio(bio, 0);
	}
	default:
		break;
	}
	return map_read(t, bio);
}

/*
 * Give a partial write what the base has in its block, if that is known without
 * asking it. A page is returned that is to be put after the write.
 */
static struct page *know_base(struct nbdcow_target *t, struct nbdcow_piece *piece)
{
	struct page *page;
	u64 run;

	piece->base_is_zero = piece->block * NBDCOW_BLOCK_SECTORS >=
			      t->overlay->base_sectors ||
			      nbdcow_base_hole(t->base, piece->block, 1, &run);
	/* The base may have become longer than we take it for. */
	if (piece->block >= nbdcow_block(t->overlay->base_sectors))
		return NULL;
	page = nbdcow_cache_find(t->base, piece->block);
	if (page)
		piece->base = nbdcow_cache_address(page, piece->block);
	return page;
}

static int write_knowing(struct nbdcow_target *t, struct nbdcow_piece *piece)
{
	struct page *page = know_base(t, piece);
	int ret = -ENODATA;

	if (page || piece->base_is_zero)
		ret = nbdcow_overlay_write(t->overlay, piece);
	if (page)
		put_page(page);
	return ret;
}

/* WRITE, or the parts of blocks at the ends of a WRITE_ZEROES. */
static int map_write(struct nbdcow_target *t, struct bio *bio)
{
	unsigned int total = bio_sectors(bio), done = 0, n;
	struct bvec_iter iter = bio->bi_iter;
	struct nbdcow_piece piece;
	int ret;

	while (done < total) {
		nbdcow_piece_init(&piece, t->ti, bio, iter);
		if (nbdcow_overlay_block(t->overlay, piece.block) ==
		    NBDCOW_OVERLAY) {
			n = nbdcow_overlay_copy(t->overlay, &piece, iter.bi_size);
			if (likely(n)) {
				iter = piece.iter;
				done += n >> SECTOR_SHIFT;
				continue;
			}
		}
		n = piece.bytes >> SECTOR_SHIFT;
		ret = nbdcow_overlay_write(t->overlay, &piece);
		if (ret == -ENODATA)
			ret = write_knowing(t, &piece);
		if (ret == -ENODATA || ret == -EINPROGRESS) {
			if (done)
				break;
			if (!nbdcow_accept_async(bio, n))
				return finish_bio(bio, -EAGAIN);
			if (ret == -EINPROGRESS)
				return nbdcow_defer(t, bio);
			nbdcow_rmw_submit(t, bio, false);
			return DM_MAPIO_SUBMITTED;
		}
		if (ret)
			return finish_bio(bio, ret);
		iter = piece.iter;
		done += n;
	}
	accept_sectors(bio, done);
	return finish_bio(bio, 0);
}

/*
 * The whole blocks of a DISCARD or WRITE_ZEROES. A block that the device's end
 * cuts counts as whole, unless the base goes on behind it and a longer table
 * could show that.
 */
static void whole_blocks(struct nbdcow_target *t, struct bio *bio, u64 *first,
			 u64 *last)
{
	sector_t start = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	sector_t end = start + bio_sectors(bio);

	*first = DIV_ROUND_UP_ULL(start, NBDCOW_BLOCK_SECTORS);
	*last = nbdcow_block(end);
	if (end == t->ti->len && t->overlay->base_sectors <= end)
		*last = DIV_ROUND_UP_ULL(end, NBDCOW_BLOCK_SECTORS);
}

static int map_zero(struct nbdcow_target *t, struct bio *bio)
{
	sector_t start = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	sector_t end = start + bio_sectors(bio);
	u64 first, last;

	whole_blocks(t, bio, &first, &last);

	if (bio_op(bio) == REQ_OP_WRITE_ZEROES) {
		/* What comes before the first whole block, or all there is. */
		if (first >= last || first * NBDCOW_BLOCK_SECTORS > start) {
			end = min_t(sector_t, end, (nbdcow_block(start) + 1) *
						   NBDCOW_BLOCK_SECTORS);
			accept_sectors(bio, end - start);
			return map_write(t, bio);
		}
		accept_sectors(bio, min_t(sector_t, end, last * NBDCOW_BLOCK_SECTORS) -
			    start);
	}
	return first < last ? nbdcow_defer(t, bio) : finish_bio(bio, 0);
}

/*
 * Outside of map()
 */

/* Undo what submitting a read to the base has changed in it: its flags and device. */
static void take_back(struct nbdcow_io *io, struct bio *bio)
{
	bio->bi_flags = io->flags;
	bio_set_dev(bio, io->t->self);
}

/* Context: the base's workqueue, for it may wait for a base that hangs. */
static void send_again(struct nbdcow_io *io, struct bio *bio,
		       unsigned int bytes)
{
	bio->bi_status = BLK_STS_OK;
	/* The base's driver may have had it in one request with others. */
	bio->bi_next = NULL;
	bio->bi_iter = io->iter;
	bio->bi_iter.bi_size = bytes;
	bio->bi_flags = io->flags;
	atomic_set(&bio->__bi_remaining, 1);
	nbdcow_read_base(bio);
}

static void work_send(struct work_struct *work)
{
	struct nbdcow_io *io = container_of(work, struct nbdcow_io, work);

	send_again(io, dm_bio_from_per_bio_data(io, sizeof(*io)), io->got);
}

/* Read stored blocks that are at hand, at most @max bytes; how many it were. */
static unsigned int copy_stored(struct nbdcow_target *t, struct bio *bio,
				struct bvec_iter *iter, unsigned int max)
{
	struct nbdcow_piece piece;
	unsigned int bytes;

	nbdcow_piece_init(&piece, t->ti, bio, *iter);
	bytes = nbdcow_overlay_copy(t->overlay, &piece, max);
	if (bytes) {
		count_read(&t->overlay->stats->overlay, bytes >> SECTOR_SHIFT);
		*iter = piece.iter;
	}
	return bytes;
}

/* Read at least one stored block, from swap if need be; *@bytes at most, then in all. */
static int work_read_stored(struct nbdcow_target *t, struct bio *bio,
			    struct bvec_iter *iter, unsigned int *bytes)
{
	struct nbdcow_piece piece;
	int ret;

	*bytes = copy_stored(t, bio, iter, *bytes);
	if (*bytes)
		return 0;
	nbdcow_piece_init(&piece, t->ti, bio, *iter);
	ret = nbdcow_overlay_wait(t->overlay, &piece, nbdcow_overlay_read);
	if (ret)
		return ret;
	*bytes = piece.bytes;
	count_read(&t->overlay->stats->overlay, *bytes >> SECTOR_SHIFT);
	*iter = piece.iter;
	return 0;
}

/*
 * A read of blocks in any state. What the base may have read of it is kept where
 * the state is BASE now, and replaced elsewhere. For the rest the base is asked
 * run by run, and we come back.
 */
static void work_read(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));
	unsigned int bytes;
	int ret = 0;

	while (io->iter.bi_size && !ret) {
		switch (state_at(t, dm_target_offset(t->ti, io->iter.bi_sector),
				 io->iter.bi_size >> SECTOR_SHIFT, &bytes)) {
		case NBDCOW_BASE:
			bytes <<= SECTOR_SHIFT;
			if (!io->got) {
				io->spans = false;
				io->got = bytes;
				INIT_WORK(&io->work, work_send);
				queue_work(t->base->wq, &io->work);
				return;
			}
			bytes = min(bytes, io->got);
			bio_advance_iter(bio, &io->iter, bytes);
			/* What follows is stored, most likely. */
			if (io->iter.bi_size)
				bytes += copy_stored(t, bio, &io->iter,
						     io->iter.bi_size);
			break;
		case NBDCOW_ZERO:
			bytes <<= SECTOR_SHIFT;
			nbdcow_zero_bio(bio, &io->iter, bytes);
			break;
		case NBDCOW_OVERLAY:
			bytes <<= SECTOR_SHIFT;
			ret = work_read_stored(t, bio, &io->iter, &bytes);
			break;
		}
		if (ret == -ESTALE)	/* discarded or reset */
			ret = 0;
		else
			io->got -= min(bytes, io->got);
	}
	bio->bi_status = BLK_STS_OK;
	take_back(io, bio);	/* what the base said is known */
	nbdcow_bio_complete(bio, ret);
}

/* A write within one block. */
static void work_write(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_piece piece;
	struct page *page;
	int ret;

	nbdcow_piece_init(&piece, t->ti, bio, bio->bi_iter);
	page = know_base(t, &piece);
	ret = nbdcow_overlay_wait(t->overlay, &piece, nbdcow_overlay_write);
	if (page)
		put_page(page);
	if (ret == -ENODATA) {
		nbdcow_rmw_submit(t, bio, true);
		return;
	}
	nbdcow_rmw_next(t);
	nbdcow_bio_complete(bio, ret);
}

static void work_io(struct work_struct *work)
{
	struct nbdcow_io *io = container_of(work, struct nbdcow_io, work);
	struct bio *bio = dm_bio_from_per_bio_data(io, sizeof(*io));
	struct nbdcow_target *t = io->t;
	u64 first, last;
	int ret;

	switch (bio_op(bio)) {
	case REQ_OP_READ:
		work_read(t, bio);
		return;
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		whole_blocks(t, bio, &first, &last);
		if (first < last) {
			ret = nbdcow_overlay_zero(t->overlay, first,
						  last - first);
			nbdcow_bio_complete(bio, ret);
			return;
		}
		fallthrough;
	default:
		work_write(t, bio);
	}
}

/**
 * nbdcow_defer() - go on with a bio in a context that may wait for I/O
 * @t: the target
 * @bio: a read that was remembered, a write within one block, or a discard or
 *	zeroing; completed later
 *
 * Context: any.
 * Return: DM_MAPIO_SUBMITTED.
 */
int nbdcow_defer(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));
	enum req_op op = bio_op(bio);

	io->t = t;
	INIT_WORK(&io->work, work_io);
	queue_work(op == REQ_OP_READ || op == REQ_OP_WRITE ? nbdcow_wq :
							    nbdcow_long_wq,
		   &io->work);
	return DM_MAPIO_SUBMITTED;
}

/*
 * Failed reads of the base that wait (queue_errors). Once a second one of them is tried
 * again; all are, once a read of the base has succeeded. A suspend without flush hands
 * them back to the core for the next table, any other suspend fails them.
 */

static bool queue_failed(struct nbdcow_target *t, struct bio *bio)
{
	unsigned long flags;
	bool queued;

	spin_lock_irqsave(&t->queue_lock, flags);
	/* Also once the core has given such a suspend up, before it says so. */
	queued = t->queue_errors &&
		 (!t->queue_closed ||
		  (t->closed_noflush && !dm_noflush_suspending(t->ti)));
	if (queued) {
		bio_list_add(&t->queued, bio);
		WRITE_ONCE(t->nr_queued, t->nr_queued + 1);
		/* Under the lock: without the bio the target may be gone. */
		queue_delayed_work(t->base->wq, &t->retry_work, NBDCOW_RETRY_PAUSE);
	}
	spin_unlock_irqrestore(&t->queue_lock, flags);
	return queued;
}

/* What a read of the base ends with that may not wait. */
static blk_status_t failed_status(struct nbdcow_target *t, blk_status_t status)
{
	return READ_ONCE(t->queue_errors) && dm_noflush_suspending(t->ti) ?
	       BLK_STS_DM_REQUEUE : status;
}

static int end_failed(struct nbdcow_target *t, struct bio *bio,
		      blk_status_t *status)
{
	if (queue_failed(t, bio))
		return DM_ENDIO_INCOMPLETE;
	*status = failed_status(t, *status);
	return DM_ENDIO_DONE;
}

/**
 * nbdcow_base_failed() - a partial write could not read the base
 * @t: the target
 * @bio: the write, which fails or waits
 * @status: why
 *
 * Context: any.
 */
void nbdcow_base_failed(struct nbdcow_target *t, struct bio *bio,
			blk_status_t status)
{
	if (queue_failed(t, bio))
		return;
	bio->bi_status = failed_status(t, status);
	bio_endio(bio);
}

static void retry_bio(struct nbdcow_target *t, struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));

	if (bio->bi_bdev == t->self) {	/* a write */
		nbdcow_defer(t, bio);
		return;
	}
	if (io->mixed) {
		io->got = 0;
		nbdcow_defer(t, bio);
		return;
	}
	send_again(io, bio, io->iter.bi_size);
}

static struct bio *take_queued(struct nbdcow_target *t)
{
	struct bio *bio;

	spin_lock_irq(&t->queue_lock);
	bio = bio_list_pop(&t->queued);
	if (bio)
		WRITE_ONCE(t->nr_queued, t->nr_queued - 1);
	spin_unlock_irq(&t->queue_lock);
	return bio;
}

static void retry_work(struct work_struct *work)
{
	struct nbdcow_target *t = container_of(to_delayed_work(work),
					       struct nbdcow_target, retry_work);
	unsigned int nr = READ_ONCE(t->base_failed) ? 1 : READ_ONCE(t->nr_queued);
	struct bio *bio;

	/* One by one: the others can be ended while the base takes no more of them. */
	while (nr-- && (bio = take_queued(t)))
		retry_bio(t, bio);
	if (READ_ONCE(t->nr_queued))
		queue_delayed_work(t->base->wq, &t->retry_work, NBDCOW_RETRY_PAUSE);
}

/* Let none wait any more. */
static void end_queued(struct nbdcow_target *t)
{
	struct bio *bio;

	while ((bio = take_queued(t))) {
		if (bio->bi_bdev != t->self)	/* its error was counted */
			take_back(dm_per_bio_data(bio, sizeof(struct nbdcow_io)), bio);
		bio->bi_status = failed_status(t, BLK_STS_IOERR);
		bio_endio(bio);
	}
}

/**
 * nbdcow_queue_errors() - choose what becomes of failed reads of the base
 * @t: the target
 * @on: they wait and try again; else they fail, also those that wait now
 *
 * Context: process context.
 */
void nbdcow_queue_errors(struct nbdcow_target *t, bool on)
{
	spin_lock_irq(&t->queue_lock);
	WRITE_ONCE(t->queue_errors, on);
	spin_unlock_irq(&t->queue_lock);
	if (!on)
		end_queued(t);
}

/**
 * nbdcow_queue_close() - let failed reads of the base wait no more, or again
 * @t: the target
 * @closed: true: for a suspend
 *
 * Context: process context.
 */
void nbdcow_queue_close(struct nbdcow_target *t, bool closed)
{
	spin_lock_irq(&t->queue_lock);
	t->queue_closed = closed;
	t->closed_noflush = closed && dm_noflush_suspending(t->ti);
	spin_unlock_irq(&t->queue_lock);
	if (closed)
		end_queued(t);
}

/**
 * nbdcow_map() - device-mapper's map(): serve a bio, or say where it goes
 * @ti: the target
 * @bio: the bio
 *
 * Context: process context; sleeps unless REQ_NOWAIT, but not for I/O of its own.
 * Return: DM_MAPIO_SUBMITTED, DM_MAPIO_REMAPPED, or DM_MAPIO_KILL for what no
 *	device like this can do.
 */
int nbdcow_map(struct dm_target *ti, struct bio *bio)
{
	struct nbdcow_target *t = ti->private;

	/* It may end anywhere, which the base's queue is not polled for. */
	bio->bi_opf &= ~REQ_POLLED;
	/*
	 * The core's worker sends what was requeued. It may wait, and EAGAIN would
	 * come too late for whoever could try again.
	 */
	if (bio->bi_opf & REQ_NOWAIT && current->flags & PF_WQ_WORKER)
		bio->bi_opf &= ~REQ_NOWAIT;

	switch (bio_op(bio)) {
	case REQ_OP_READ:
		return map_read_block(t, bio);
	case REQ_OP_WRITE:
		return map_write(t, bio);
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return map_zero(t, bio);
	default:
		return DM_MAPIO_KILL;
	}
}

/**
 * nbdcow_end_io() - device-mapper's end_io(): a bio was completed
 * @ti: the target
 * @bio: the bio, by map() itself or by the base
 * @status: how; may be changed
 *
 * Context: any.
 * Return: DM_ENDIO_DONE, or DM_ENDIO_INCOMPLETE when we go on with it.
 */
int nbdcow_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *status)
{
	struct nbdcow_target *t = ti->private;
	struct nbdcow_io *io = bio->bi_private;

	if (likely(!io && !*status && !READ_ONCE(t->base_failed)))
		return DM_ENDIO_DONE;
	if (bio->bi_bdev == t->self)
		return DM_ENDIO_DONE;
	/* Read-ahead may fail for no reason but load. */
	if (*status && (bio->bi_opf & REQ_RAHEAD ||
			(*status == BLK_STS_AGAIN && bio->bi_opf & REQ_NOWAIT)))
		return DM_ENDIO_DONE;
	/* The bad spot may be where nobody needs the base. */
	if (*status && io && io->spans) {
		io->got = 0;
		nbdcow_defer(t, bio);
		return DM_ENDIO_INCOMPLETE;
	}
	nbdcow_base_done(t, *status);
	if (*status)
		return io ? end_failed(t, bio, status) : DM_ENDIO_DONE;
	if (!io || !io->mixed)
		return DM_ENDIO_DONE;
	nbdcow_defer(t, bio);
	return DM_ENDIO_INCOMPLETE;
}

/**
 * nbdcow_io_init() - prepare what bios need of a target
 * @t: the target, zeroed
 *
 * Context: process context, sleeps.
 * Return: 0 or -ENOMEM; nbdcow_io_exit() is due in both cases.
 */
int nbdcow_io_init(struct nbdcow_target *t)
{
	spin_lock_init(&t->queue_lock);
	bio_list_init(&t->queued);
	INIT_DELAYED_WORK(&t->retry_work, retry_work);
	return nbdcow_rmw_init(t);
}

/**
 * nbdcow_io_exit() - undo nbdcow_io_init()
 * @t: the target, without I/O in flight
 *
 * Context: process context, sleeps.
 */
void nbdcow_io_exit(struct nbdcow_target *t)
{
	cancel_delayed_work_sync(&t->retry_work);
	nbdcow_rmw_exit(t);
}
