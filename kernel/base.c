// SPDX-License-Identifier: GPL-2.0-only
/*
 * What all overlays on one base device share: a cache of its blocks, the reads
 * of it that fill the cache, and the knowledge of its holes.
 *
 * An xarray holds for each block nothing, a page, or the fetch that is under way
 * to read it. Its pages are no tmpfs pages, since the cache must never be swapped
 * out: it is dropped instead, by a shrinker and by second chance at its limit.
 *
 * Pages are found without a lock, as in the page cache: take a reference if there
 * is one to take, then look whether the page is still where it was found. All
 * that changes the array holds its lock. A fetch enters its blocks one by one, in
 * order; where another one was faster, it ends. Reads that find a fetch join it
 * under the lock, and a fetch replaces itself by its pages under the lock, so that
 * nobody joins too late. The content never changes, so nothing else can go wrong:
 * a block that is written meanwhile is not BASE any more.
 *
 * A read of the base that failed leaves nothing behind. The reads that waited for
 * it are sent to the base as they are, each to fail or not by itself.
 */
#include <linux/ioprio.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/slab.h>
#include <linux/vmstat.h>
#include <linux/wait_bit.h>

#include "compat.h"
#include "nbdcow.h"

/* Blocks of one read of the base; as many as a bio has vectors. */
#define NBDCOW_FETCH_MAX	256U
/* Reads of the base that a prefetch has under way. */
#define NBDCOW_PREFETCH_DEPTH	2
/* Blocks that get a second chance before eviction takes any. */
#define NBDCOW_CHANCES		512

struct nbdcow_fetch {
	struct nbdcow_base *base; /* with a reference */
	struct block_device *bdev; /* what is read; the driver changes bio's */
	struct nbdcow_prefetch *prefetch; /* to tell, or NULL */
	u64 first;		/* first block */
	unsigned int nr;	/* blocks */
	struct bio_list bios;	/* reads that wait; under the array's lock */
	struct work_struct work; /* ends the fetch */
	struct bio bio;		/* reads the base */
	struct bio_vec bvecs[];	/* of bio: a page for each block */
};

static DEFINE_MUTEX(bases_mutex);
static LIST_HEAD(bases);

/* Fetches are told from pages by a tag. */
static void *fetch_entry(struct nbdcow_fetch *fetch)
{
	return xa_tag_pointer(fetch, 1);
}

static bool is_fetch(void *entry)
{
	return xa_pointer_tag(entry) == 1;
}

/*
 * The pages
 */

/**
 * nbdcow_cache_address() - where a cached block is
 * @page: its page
 * @block: the block
 *
 * Context: any.
 * Return: its first byte.
 */
void *nbdcow_cache_address(struct page *page, u64 block)
{
	return page_address(page) +
	       offset_in_page((unsigned long)block << NBDCOW_BLOCK_SHIFT);
}

static struct page *page_alloc(gfp_t gfp)
{
	struct page *page = alloc_page(gfp | __GFP_RECLAIMABLE);

	if (page)	/* counts as memory that is as good as free */
		mod_node_page_state(page_pgdat(page),
				    NR_KERNEL_MISC_RECLAIMABLE, 1);
	return page;
}

/* Take the cache's own reference back. */
static void page_drop(struct page *page)
{
	mod_node_page_state(page_pgdat(page), NR_KERNEL_MISC_RECLAIMABLE, -1);
	put_page(page);
}

/**
 * nbdcow_cache_find() - find a block of the base in the cache
 * @base: the base
 * @block: the block
 *
 * Context: any.
 * Return: its page with a reference, or NULL.
 */
struct page *nbdcow_cache_find(struct nbdcow_base *base, u64 block)
{
	struct folio *folio;
	struct page *page;

	if (!atomic_long_read(&base->cached))
		return NULL;

	rcu_read_lock();
	do {
		page = xa_load(&base->blocks, block);
		if (!page || is_fetch(page)) {
			page = NULL;
			break;
		}
		folio = page_folio(page);
		if (!folio_try_get(folio))
			continue;
		if (likely(xa_load(&base->blocks, block) == page &&
			   page_folio(page) == folio)) {
			if (!folio_test_referenced(folio))
				folio_set_referenced(folio);
			break;
		}
		folio_put(folio);
	} while (true);
	rcu_read_unlock();
	return page;
}

/* Drop @want blocks that were not used lately; @all: of any, which is no eviction. */
static unsigned long cache_evict(struct nbdcow_base *base, unsigned long want, bool all)
{
	unsigned long chances = all ? 0 : NBDCOW_CHANCES, dropped = 0;
	XA_STATE(xas, &base->blocks, 0);
	struct page *page = NULL;
	bool wrapped = false;

	xa_lock(&base->blocks);
	xas_set(&xas, base->hand);
	while (dropped < want) {
		page = xas_find(&xas, ULONG_MAX);
		if (!page) {
			if (wrapped)
				break;
			wrapped = true;
			xas_set(&xas, 0);
			continue;
		}
		if (is_fetch(page))
			continue;
		if (chances && folio_test_referenced(page_folio(page))) {
			folio_clear_referenced(page_folio(page));
			chances--;
			continue;
		}
		xas_store(&xas, NULL);
		page_drop(page);
		dropped++;
	}
	base->hand = page ? xas.xa_index + 1 : 0;
	atomic_long_sub(dropped, &base->cached);
	xa_unlock(&base->blocks);
	if (!all)
		atomic_long_add(dropped, &base->evicted);
	return dropped;
}

/* Drop what is more than the limit, but for what is under way. */
static void cache_trim(struct nbdcow_base *base)
{
	unsigned long limit = READ_ONCE(base->limit), now;

	while ((now = atomic_long_read(&base->cached)) > limit) {
		if (!cache_evict(base, min_t(unsigned long, now - limit,
					     NBDCOW_FETCH_MAX), false))
			break;
		cond_resched();
	}
}

/* Room for @nr more blocks; with @replace at the cost of others. */
static bool cache_reserve(struct nbdcow_base *base, unsigned int nr, bool replace)
{
	unsigned long limit = READ_ONCE(base->limit);
	unsigned long now = atomic_long_add_return(nr, &base->cached);

	if (now <= limit)
		return true;
	if (replace && nr <= limit) {
		cache_evict(base, min_t(unsigned long, now - limit, 2 * nr), false);
		now = atomic_long_read(&base->cached);
		if (now <= limit)
			return true;
	}
	atomic_long_sub(nr, &base->cached);
	return false;
}

/**
 * nbdcow_cache_add() - put a copy of a block of the base into the cache
 * @base: the base
 * @block: a block that the base has whole
 * @content: what it holds
 *
 * Does nothing where there is no room or no memory.
 *
 * Context: process context; GFP_NOIO.
 */
void nbdcow_cache_add(struct nbdcow_base *base, u64 block, const void *content)
{
	gfp_t gfp = nbdcow_gfp(NBDCOW_MAP);
	struct page *page;

	if (!cache_reserve(base, 1, true))
		return;
	page = page_alloc(gfp);
	if (page) {
		memcpy(nbdcow_cache_address(page, block), content, NBDCOW_BLOCK_BYTES);
		if (!xa_cmpxchg(&base->blocks, block, NULL, page, gfp))
			return;
		page_drop(page);
	}
	atomic_long_dec(&base->cached);
}

/**
 * nbdcow_cache_drop() - drop all that is cached
 * @base: the base
 *
 * Fetches that are under way still fill the cache.
 *
 * Context: process context, sleeps.
 */
void nbdcow_cache_drop(struct nbdcow_base *base)
{
	while (cache_evict(base, NBDCOW_FETCH_MAX, true))
		cond_resched();
}

static unsigned long shrinker_count(struct shrinker *shrinker,
				    struct shrink_control *sc)
{
	struct nbdcow_base *base;
	unsigned long count = 0;

	if (!mutex_trylock(&bases_mutex))
		return 0;
	list_for_each_entry(base, &bases, list)
		count += atomic_long_read(&base->cached);
	mutex_unlock(&bases_mutex);
	return count ? count : SHRINK_EMPTY;
}

static unsigned long shrinker_scan(struct shrinker *shrinker,
				   struct shrink_control *sc)
{
	unsigned long total = 0;
	struct nbdcow_base *base;

	if (!mutex_trylock(&bases_mutex))
		return SHRINK_STOP;
	list_for_each_entry(base, &bases, list) {
		total += cache_evict(base, sc->nr_to_scan - total, false);
		if (total >= sc->nr_to_scan) {
			list_rotate_to_front(&base->list, &bases);
			break;
		}
	}
	mutex_unlock(&bases_mutex);
	return total ? total : SHRINK_STOP;
}

/* The last reference frees the cache. */
static void base_release(struct kref *kref)
{
	struct nbdcow_base *base = container_of(kref, struct nbdcow_base, kref);

	nbdcow_cache_drop(base);
	xa_destroy(&base->blocks);
	nbdcow_map_destroy(rcu_dereference_protected(base->holes, 1));
	kfree(base);
}

static void base_put(struct nbdcow_base *base)
{
	kref_put(&base->kref, base_release);
}

/*
 * Fetches
 */

static void fetch_endio(struct bio *bio)
{
	struct nbdcow_fetch *fetch = container_of(bio, struct nbdcow_fetch, bio);

	/* Only after a success nothing is read again. */
	queue_work(bio->bi_status ? fetch->base->wq : nbdcow_wq, &fetch->work);
}

static void fetch_read(struct nbdcow_fetch *fetch, blk_opf_t flags)
{
	unsigned int i;

	bio_init(&fetch->bio, fetch->bdev, fetch->bvecs, fetch->nr, REQ_OP_READ | flags);
	fetch->bio.bi_iter.bi_sector = fetch->first * NBDCOW_BLOCK_SECTORS;
	fetch->bio.bi_end_io = fetch_endio;
	if (fetch->prefetch)
		fetch->bio.bi_ioprio = IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 7);
	for (i = 0; i < fetch->nr; i++) {
		struct page *page = fetch->bvecs[i].bv_page;
		void *to = nbdcow_cache_address(page, fetch->first + i);

		__bio_add_page(&fetch->bio, page, NBDCOW_BLOCK_BYTES,
			       offset_in_page(to));
	}
	submit_bio_noacct(&fetch->bio);
}

/* Replace the fetch by its pages, or by nothing, and take who waited for it. */
static void fetch_publish(struct nbdcow_fetch *fetch, bool ok,
			  struct bio_list *bios)
{
	struct nbdcow_base *base = fetch->base;
	XA_STATE(xas, &base->blocks, fetch->first);
	unsigned int i;

	xa_lock(&base->blocks);
	for (i = 0; i < fetch->nr; i++) {
		struct page *page = fetch->bvecs[i].bv_page;

		xas_set(&xas, fetch->first + i);
		xas_load(&xas);
		if (ok)	/* whoever copies from it below has a reference, too */
			get_page(page);
		xas_store(&xas, ok ? page : NULL);
	}
	*bios = fetch->bios;
	xa_unlock(&base->blocks);
}

static void fetch_copy(struct nbdcow_fetch *fetch, struct bio *bio)
{
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct bvec_iter iter = bio->bi_iter;
	struct nbdcow_piece piece;

	while (iter.bi_size) {
		nbdcow_piece_init(&piece, io->t->ti, bio, iter);
		nbdcow_copy_from_page(&piece, fetch->bvecs[piece.block -
							   fetch->first].bv_page);
		iter = piece.iter;
	}
	nbdcow_base_done(io->t, BLK_STS_OK);
	nbdcow_bio_complete(bio, 0);
}

/* One read less under way; the lock is held, and what wakes needs a barrier. */
static void prefetch_less(struct nbdcow_prefetch *prefetch)
{
	WRITE_ONCE(prefetch->inflight, prefetch->inflight - 1);
	if (prefetch->inflight)
		return;
	smp_mb();	/* inflight before the look for who waits */
	wake_up_var(&prefetch->inflight);
}

static void prefetch_ended(struct nbdcow_fetch *fetch, blk_status_t status)
{
	struct nbdcow_prefetch *prefetch = fetch->prefetch;

	spin_lock(&prefetch->lock);
	if (status && prefetch->state == NBDCOW_PREFETCH_RUNNING)
		prefetch->state = NBDCOW_PREFETCH_FAILED;
	queue_delayed_work(fetch->base->wq, &prefetch->work, 0);
	prefetch_less(prefetch);
	spin_unlock(&prefetch->lock);
}

/* Let everybody have what was read, or read for themselves. */
static void fetch_end(struct nbdcow_fetch *fetch, blk_status_t status)
{
	struct nbdcow_base *base = fetch->base;
	struct bio_list bios;
	struct bio *bio;
	unsigned int i;

	fetch_publish(fetch, !status, &bios);
	while ((bio = bio_list_pop(&bios))) {
		if (status)
			nbdcow_read_base(bio);
		else
			fetch_copy(fetch, bio);
	}
	for (i = 0; i < fetch->nr; i++) {
		if (status)
			page_drop(fetch->bvecs[i].bv_page);
		else
			put_page(fetch->bvecs[i].bv_page);
	}
	if (status)
		atomic_long_sub(fetch->nr, &base->cached);
	else
		cache_trim(base);	/* the limit may have become lower meanwhile */
	if (fetch->prefetch)
		prefetch_ended(fetch, status);
	kfree(fetch);
	base_put(base);
}

static void fetch_work(struct work_struct *work)
{
	struct nbdcow_fetch *fetch =
		container_of(work, struct nbdcow_fetch, work);
	blk_status_t status = fetch->bio.bi_status;

	bio_uninit(&fetch->bio);
	/* The bio that began it, or the prefetch, still keeps the device. */
	if (status == BLK_STS_AGAIN && fetch->bio.bi_opf & REQ_NOWAIT)
		fetch_read(fetch, 0);
	else
		fetch_end(fetch, status);
}

/*
 * Enter a fetch of up to @nr blocks that nobody else fetches; NULL when there
 * is no room or no memory, or when the first block is there by now.
 */
static struct nbdcow_fetch *fetch_create(struct nbdcow_target *t, u64 first,
					 unsigned int nr, gfp_t gfp,
					 bool replace)
{
	struct nbdcow_base *base = t->base;
	unsigned long limit = READ_ONCE(base->limit);
	unsigned long cached = replace ? 0 : atomic_long_read(&base->cached);
	struct nbdcow_fetch *fetch;
	unsigned int pages, i;

	if (cached >= limit)
		return NULL;
	nr = min_t(unsigned long, nr, limit - cached);
	if (!cache_reserve(base, nr, replace))
		return NULL;
	fetch = kmalloc(struct_size(fetch, bvecs, nr), gfp);
	if (!fetch) {
		atomic_long_sub(nr, &base->cached);
		return NULL;
	}
	fetch->base = base;
	fetch->bdev = t->dev->bdev;
	fetch->prefetch = NULL;
	fetch->first = first;
	bio_list_init(&fetch->bios);
	INIT_WORK(&fetch->work, fetch_work);
	for (pages = 0; pages < nr; pages++) {
		fetch->bvecs[pages].bv_page = page_alloc(gfp);
		if (!fetch->bvecs[pages].bv_page)
			break;
	}
	for (i = 0; i < pages; i++)
		if (xa_cmpxchg(&base->blocks, first + i, NULL,
			       fetch_entry(fetch), gfp))
			break;
	atomic_long_sub(nr - i, &base->cached);
	while (pages > i)
		page_drop(fetch->bvecs[--pages].bv_page);
	fetch->nr = i;
	if (!i) {
		kfree(fetch);
		return NULL;
	}
	kref_get(&base->kref);
	return fetch;
}

/* Join the fetch of a block; -ESTALE if there is none any more. */
static int fetch_join(struct nbdcow_target *t, u64 block, struct bio *bio,
		      unsigned int sectors)
{
	struct nbdcow_base *base = t->base;
	unsigned int skip = bio->bi_iter.bi_sector % NBDCOW_BLOCK_SECTORS;
	XA_STATE(xas, &base->blocks, block);
	int ret = DM_MAPIO_SUBMITTED;
	struct nbdcow_fetch *fetch;
	unsigned int n = 0;
	void *entry;

	xa_lock(&base->blocks);
	entry = xas_load(&xas);
	if (!entry || !is_fetch(entry)) {
		ret = -ESTALE;
	} else {
		do {
			n += NBDCOW_BLOCK_SECTORS;
		} while (n < skip + sectors && xas_next(&xas) == entry);
		sectors = min(n - skip, sectors);
		fetch = xa_untag_pointer(entry);
		if (nbdcow_accept_async(bio, sectors)) {
			bio_list_add(&fetch->bios, bio);
			this_cpu_add(t->overlay->stats->misses, sectors);
		} else {
			ret = -EAGAIN;
		}
	}
	xa_unlock(&base->blocks);
	return ret;
}

/**
 * nbdcow_cache_fetch() - read through the cache
 * @t: the target
 * @bio: a read that begins with blocks in state BASE
 * @sectors: how many sectors of it are
 *
 * Takes as much of the bio as one fetch serves, and completes it later.
 *
 * Context: process context; neither waits for I/O nor for memory.
 * Return: DM_MAPIO_SUBMITTED; -EAGAIN if REQ_NOWAIT forbids; -ESTALE if the
 *	first block was cached meanwhile; -ENOENT if the cache cannot help.
 */
int nbdcow_cache_fetch(struct nbdcow_target *t, struct bio *bio,
		       unsigned int sectors)
{
	sector_t sector = dm_target_offset(t->ti, bio->bi_iter.bi_sector);
	u64 end = DIV_ROUND_UP_ULL(sector + sectors, NBDCOW_BLOCK_SECTORS);
	struct nbdcow_io *io = dm_per_bio_data(bio, sizeof(*io));
	blk_opf_t nowait = bio->bi_opf & REQ_NOWAIT;
	unsigned int skip = sector % NBDCOW_BLOCK_SECTORS;
	struct nbdcow_base *base = t->base;
	u64 block = nbdcow_block(sector);
	struct nbdcow_fetch *fetch;
	unsigned long next = block;
	void *entry;
	bool taken;

	/* What the base does not have whole is not worth the trouble. */
	end = min3(end, nbdcow_block(t->overlay->base_sectors),
		   block + NBDCOW_FETCH_MAX);
	if (block >= end)
		return -ENOENT;

	io->t = t;
	entry = xa_find(&base->blocks, &next, end - 1, XA_PRESENT);
	if (entry && next == block)
		return is_fetch(entry) ?
		       fetch_join(t, block, bio, sectors) : -ESTALE;
	end = entry ? next : end;
	/* More than this cannot be had, and REQ_NOWAIT wants all or nothing. */
	if (nowait && (end - block) * NBDCOW_BLOCK_SECTORS - skip <
		      bio_sectors(bio))
		return -EAGAIN;
	fetch = fetch_create(t, block, end - block,
			     nbdcow_gfp(nowait ? NBDCOW_NOWAIT : NBDCOW_MAP),
			     true);
	if (!fetch)	/* no room, or somebody else was faster */
		return xa_load(&base->blocks, block) ? -ESTALE : -ENOENT;
	xa_lock(&base->blocks);
	taken = nbdcow_accept_async(bio, min(sectors, fetch->nr *
					     NBDCOW_BLOCK_SECTORS - skip));
	if (taken)
		bio_list_add(&fetch->bios, bio);
	xa_unlock(&base->blocks);
	if (!taken) {
		/* Who joined meanwhile is sent to the base by the work: that can block. */
		bio_init(&fetch->bio, NULL, NULL, 0, REQ_OP_READ);
		fetch->bio.bi_status = BLK_STS_IOERR;
		fetch_endio(&fetch->bio);
		return -EAGAIN;
	}
	this_cpu_add(t->overlay->stats->misses, bio_sectors(bio));
	fetch_read(fetch, nowait);
	return DM_MAPIO_SUBMITTED;
}

/**
 * nbdcow_cache_gap() - how far the next cached block is
 * @base: the base
 * @block: a block that is not cached
 * @max: most blocks that the caller cares for
 *
 * Context: any.
 * Return: number of blocks from @block on that are not cached, at most @max.
 */
u64 nbdcow_cache_gap(struct nbdcow_base *base, u64 block, u64 max)
{
	unsigned long next = block;

	if (!atomic_long_read(&base->cached) ||
	    !xa_find(&base->blocks, &next, block + max - 1, XA_PRESENT))
		return max;
	return next - block;
}

/*
 * Prefetch
 */

/* Enter a fetch of what comes next; NULL when nothing does, or nothing fits. */
static struct nbdcow_fetch *prefetch_next(struct nbdcow_target *t)
{
	struct nbdcow_prefetch *prefetch = &t->prefetch;
	struct nbdcow_base *base = t->base;
	gfp_t gfp = nbdcow_gfp(NBDCOW_WORK);
	struct nbdcow_fetch *fetch = NULL;
	u64 next = prefetch->next, run;

	while (!fetch && next < prefetch->end) {
		run = prefetch->end - next;
		if (!nbdcow_base_hole(base, next, run, &run)) {
			run = nbdcow_cache_gap(base, next,
					       min_t(u64, run, NBDCOW_FETCH_MAX));
			if (run)
				fetch = fetch_create(t, next, run, gfp, false);
			if (run && !fetch && !xa_load(&base->blocks, next))
				break;	/* no room or no memory */
			/* else it is there, or on its way */
			run = fetch ? fetch->nr : 1;
			cond_resched();
		}
		next += run;
		WRITE_ONCE(prefetch->next, next);	/* for the status */
	}
	return fetch;
}

/* Is it too early for the next read? Then the work comes again. */
static bool prefetch_waits(struct nbdcow_target *t)
{
	struct nbdcow_prefetch *prefetch = &t->prefetch;
	s64 left = prefetch->not_before - ktime_get_ns();

	/* What is less than a timer knows counts with the next pause. */
	if (!prefetch->rate || left < TICK_NSEC)
		return false;
	queue_delayed_work(t->base->wq, &prefetch->work, nsecs_to_jiffies(left));
	return true;
}

/* For as long as blocks take at the rate, from when the last pause ended. */
static void add_pause(struct nbdcow_prefetch *prefetch, unsigned int blocks)
{
	u64 kib = (u64)blocks * NBDCOW_BLOCK_BYTES / 1024;

	prefetch->not_before = max(prefetch->not_before, ktime_get_ns()) +
			       div_u64(kib * NSEC_PER_SEC, prefetch->rate);
}

static void prefetch_work(struct work_struct *work)
{
	struct nbdcow_prefetch *prefetch =
		container_of(to_delayed_work(work), struct nbdcow_prefetch, work);
	struct nbdcow_target *t =
		container_of(prefetch, struct nbdcow_target, prefetch);
	struct nbdcow_fetch *fetch;

	for (;;) {
		spin_lock(&prefetch->lock);
		if (prefetch->state != NBDCOW_PREFETCH_RUNNING ||
		    prefetch->paused || prefetch_waits(t) ||
		    prefetch->inflight >= (prefetch->rate ?
					   1 : NBDCOW_PREFETCH_DEPTH)) {
			spin_unlock(&prefetch->lock);
			return;
		}
		WRITE_ONCE(prefetch->inflight, prefetch->inflight + 1);
		spin_unlock(&prefetch->lock);

		fetch = prefetch_next(t);
		if (!fetch)
			break;
		fetch->prefetch = prefetch;
		if (prefetch->rate)
			add_pause(prefetch, fetch->nr);
		fetch_read(fetch, 0);
	}

	spin_lock(&prefetch->lock);
	if (prefetch->state == NBDCOW_PREFETCH_RUNNING) {
		if (prefetch->next < prefetch->end)
			prefetch->state = NBDCOW_PREFETCH_FULL;
		else if (prefetch->inflight == 1)
			prefetch->state = NBDCOW_PREFETCH_DONE;
	}
	prefetch_less(prefetch);
	spin_unlock(&prefetch->lock);
}

/**
 * nbdcow_prefetch_start() - begin to fill the cache in the background
 * @t: the target
 * @block: first block of the base
 * @count: number of blocks; what lies past the base's end is ignored
 * @rate: most KiB to read in a second, or 0
 *
 * It ends when all is cached, when the cache's limit leaves no room, when the
 * base gives an error, or with nbdcow_prefetch_stop().
 *
 * Context: process context, waits for reads of one that was stopped.
 * Return: 0, -EBUSY when another one is under way, or -ERESTARTSYS.
 */
int nbdcow_prefetch_start(struct nbdcow_target *t, u64 block, u64 count,
			  unsigned int rate)
{
	u64 blocks = min_t(u64, nbdcow_block(t->overlay->base_sectors),
			   NBDCOW_MAX_BLOCKS);
	struct nbdcow_prefetch *prefetch = &t->prefetch;
	int ret = 0;

	block = min(block, blocks);
	spin_lock(&prefetch->lock);
	while (prefetch->state != NBDCOW_PREFETCH_RUNNING &&
	       prefetch->inflight && !ret) {
		spin_unlock(&prefetch->lock);
		ret = wait_var_event_interruptible(&prefetch->inflight,
						   !READ_ONCE(prefetch->inflight));
		spin_lock(&prefetch->lock);
	}
	if (!ret && prefetch->state == NBDCOW_PREFETCH_RUNNING)
		ret = -EBUSY;
	if (ret) {
		spin_unlock(&prefetch->lock);
		return ret;
	}
	prefetch->first = block;
	prefetch->next = block;
	prefetch->end = block + min(count, blocks - block);
	prefetch->rate = rate;
	prefetch->not_before = 0;
	prefetch->state = NBDCOW_PREFETCH_RUNNING;
	spin_unlock(&prefetch->lock);
	/* One that was stopped may have left a pause behind. */
	mod_delayed_work(t->base->wq, &prefetch->work, 0);
	return 0;
}

/**
 * nbdcow_prefetch_stop() - end a prefetch; reads under way still come
 * @t: the target
 *
 * Context: process context.
 */
void nbdcow_prefetch_stop(struct nbdcow_target *t)
{
	struct nbdcow_prefetch *prefetch = &t->prefetch;

	spin_lock(&prefetch->lock);
	if (prefetch->state == NBDCOW_PREFETCH_RUNNING)
		prefetch->state = NBDCOW_PREFETCH_STOPPED;
	spin_unlock(&prefetch->lock);
}

/**
 * nbdcow_prefetch_pause() - let no prefetch read, or let it go on
 * @t: the target
 * @pause: true: begin no more reads; a suspend does not wait for a base that hangs
 *
 * Context: process context.
 */
void nbdcow_prefetch_pause(struct nbdcow_target *t, bool pause)
{
	struct nbdcow_prefetch *prefetch = &t->prefetch;

	spin_lock(&prefetch->lock);
	prefetch->paused = pause;
	spin_unlock(&prefetch->lock);
	if (!pause)
		queue_delayed_work(t->base->wq, &prefetch->work, 0);
}

/*
 * Holes
 */

/**
 * nbdcow_base_hole() - does the base read as zeroes, as far as is known?
 * @base: the base
 * @block: first block
 * @max: most blocks that the caller cares for
 * @run: set to the number of blocks for which the answer is the same
 *
 * Context: any.
 * Return: true if it does.
 */
bool nbdcow_base_hole(struct nbdcow_base *base, u64 block, u64 max, u64 *run)
{
	struct nbdcow_map *holes;
	bool hole = false;

	*run = max;
	if (!rcu_access_pointer(base->holes))
		return false;
	rcu_read_lock();
	holes = rcu_dereference(base->holes);
	if (block < holes->nr_blocks) {
		max = min(max, holes->nr_blocks - block);
		hole = nbdcow_map_run(holes, block, max, run) == NBDCOW_ZERO;
	}
	rcu_read_unlock();
	return hole;
}

/**
 * nbdcow_base_add_hole() - make known that the base reads as zeroes somewhere
 * @t: a target on this base
 * @block: first block
 * @count: number of blocks
 *
 * Context: process context, sleeps.
 * Return: 0, -ERANGE past the end of the base, or -ENOMEM.
 */
int nbdcow_base_add_hole(struct nbdcow_target *t, u64 block, u64 count)
{
	u64 blocks = nbdcow_block(t->overlay->base_sectors);
	struct nbdcow_base *base = t->base;
	struct nbdcow_map *holes;
	unsigned int noio;
	int ret = 0;

	if (block > blocks || count > blocks - block)
		return -ERANGE;

	/* A suspend may be waiting for this message. */
	noio = memalloc_noio_save();
	mutex_lock(&base->mutex);
	holes = rcu_dereference_protected(base->holes, 1);
	if (!holes) {
		holes = nbdcow_map_create(blocks, GFP_KERNEL);
		if (!holes)
			ret = -ENOMEM;
		else
			rcu_assign_pointer(base->holes, holes);
	}
	if (!ret && block + count > holes->nr_blocks)
		ret = -ERANGE;	/* the base was smaller when this began */
	while (count && !ret) {
		unsigned long n = nbdcow_leaf_span(block, count);

		if (n == NBDCOW_LEAF_BLOCKS) {
			nbdcow_map_zero_leaf(holes, block);
		} else {
			ret = nbdcow_map_prepare(holes, block, GFP_KERNEL);
			if (!ret && !nbdcow_map_is_uniform(holes, block, n,
							   NBDCOW_ZERO))
				nbdcow_map_change(holes, block, n, NBDCOW_ZERO);
		}
		block += n;
		count -= n;
		cond_resched();
	}
	mutex_unlock(&base->mutex);
	memalloc_noio_restore(noio);
	return ret;
}

/*
 * Objects
 */

/* The strictest wish of all targets counts. */
static void update_limit(struct nbdcow_base *base)
{
	unsigned long limit = NBDCOW_NO_LIMIT;
	struct nbdcow_target *t;

	list_for_each_entry(t, &base->targets, list)
		limit = min(limit, READ_ONCE(t->cache_limit));
	WRITE_ONCE(base->limit, limit);
	cache_trim(base);
}

/**
 * nbdcow_base_set_limit() - say how much a target lets the cache hold
 * @t: the target
 * @limit: blocks, or NBDCOW_NO_LIMIT
 *
 * Context: process context, sleeps.
 */
void nbdcow_base_set_limit(struct nbdcow_target *t, unsigned long limit)
{
	mutex_lock(&t->base->mutex);
	WRITE_ONCE(t->cache_limit, limit);
	if (list_empty(&t->list))
		list_add(&t->list, &t->base->targets);
	update_limit(t->base);
	mutex_unlock(&t->base->mutex);
}

static struct nbdcow_base *base_alloc(struct block_device *bdev)
{
	struct nbdcow_base *base = kzalloc(sizeof(*base), GFP_KERNEL);

	if (!base)
		return NULL;
	base->wq = alloc_workqueue("nbdcow_base-%u:%u", WQ_MEM_RECLAIM | WQ_UNBOUND,
				   0, MAJOR(bdev->bd_dev), MINOR(bdev->bd_dev));
	if (!base->wq) {
		kfree(base);
		return NULL;
	}
	base->bdev = bdev;
	base->limit = NBDCOW_NO_LIMIT;
	xa_init(&base->blocks);
	mutex_init(&base->mutex);
	INIT_LIST_HEAD(&base->targets);
	kref_init(&base->kref);
	return base;
}

/* Under bases_mutex: the base of a device with one user more, or NULL. */
static struct nbdcow_base *base_find(struct block_device *bdev)
{
	struct nbdcow_base *base;

	list_for_each_entry(base, &bases, list) {
		if (base->bdev == bdev) {
			kref_get(&base->kref);
			base->nr_users++;
			return base;
		}
	}
	return NULL;
}

/* What the overlays on a device share; NULL without memory. */
static struct nbdcow_base *base_get(struct block_device *bdev)
{
	struct nbdcow_base *base, *new;

	mutex_lock(&bases_mutex);
	base = base_find(bdev);
	mutex_unlock(&bases_mutex);
	if (base)
		return base;

	/* The shrinker needs the mutex, and this may need the shrinker. */
	new = base_alloc(bdev);
	if (!new)
		return NULL;
	mutex_lock(&bases_mutex);
	base = base_find(bdev);
	if (!base) {
		new->nr_users = 1;
		list_add(&new->list, &bases);
	}
	mutex_unlock(&bases_mutex);
	if (!base)
		return new;
	destroy_workqueue(new->wq);
	kfree(new);
	return base;
}

/**
 * nbdcow_base_init() - prepare what a target has to do with its base
 * @t: the target, zeroed, with its base device open
 *
 * Context: process context, sleeps.
 * Return: 0 or -ENOMEM.
 */
int nbdcow_base_init(struct nbdcow_target *t)
{
	INIT_LIST_HEAD(&t->list);
	spin_lock_init(&t->prefetch.lock);
	t->prefetch.paused = true;	/* until the table is resumed */
	INIT_DELAYED_WORK(&t->prefetch.work, prefetch_work);
	t->base = base_get(t->dev->bdev);
	return t->base ? 0 : -ENOMEM;
}

/**
 * nbdcow_base_exit() - undo nbdcow_base_init()
 * @t: the target, without I/O in flight
 *
 * Context: process context; waits for what a prefetch still reads.
 */
void nbdcow_base_exit(struct nbdcow_target *t)
{
	struct nbdcow_prefetch *prefetch = &t->prefetch;
	struct nbdcow_base *base = t->base;
	bool last;

	if (!base)
		return;
	nbdcow_prefetch_pause(t, true);
	wait_var_event(&prefetch->inflight, !READ_ONCE(prefetch->inflight));
	/* The last one may still be unlocking. */
	spin_lock(&prefetch->lock);
	spin_unlock(&prefetch->lock);
	cancel_delayed_work_sync(&prefetch->work);

	mutex_lock(&base->mutex);
	list_del_init(&t->list);
	update_limit(base);
	mutex_unlock(&base->mutex);
	/* What only the end of a fetch keeps is not for the next device of that number. */
	mutex_lock(&bases_mutex);
	last = !--base->nr_users;
	if (last)
		list_del(&base->list);
	mutex_unlock(&bases_mutex);
	if (last) {
		/* Memory pressure does not find it any more. */
		nbdcow_cache_drop(base);
		/* Not with the last reference, which a work of its own may put. */
		destroy_workqueue(base->wq);
	}
	base_put(base);
}

static struct shrinker *shrinker;

/**
 * nbdcow_shrinker_init() - let memory pressure drop caches
 *
 * Context: module load.
 * Return: 0 or -ENOMEM.
 */
int nbdcow_shrinker_init(void)
{
	shrinker = nbdcow_shrinker_start(shrinker_count, shrinker_scan);
	return shrinker ? 0 : -ENOMEM;
}

/**
 * nbdcow_shrinker_exit() - undo nbdcow_shrinker_init()
 *
 * Context: module unload.
 */
void nbdcow_shrinker_exit(void)
{
	nbdcow_shrinker_stop(shrinker);
}
