/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between kernel versions, and nothing else. The code is
 * written for the newest supported kernel (7.3); older ones get its names here.
 */
#ifndef NBDCOW_COMPAT_H
#define NBDCOW_COMPAT_H

#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/version.h>

/* 7.0: the flags of shmem_file_setup() became a bitmap type. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 0, 0)
#define VMA_NORESERVE_BIT	VM_NORESERVE
#define mk_vma_flags(flag)	(flag)
#endif

/* hex2bin() moved from kernel.h to a header of its own. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#include <linux/hex.h>
#endif

/* 6.17: workqueues say that they are bound to CPUs. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 17, 0)
#define WQ_PERCPU		0
#endif

/* 6.5: block devices are opened with blk_mode_t. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 5, 0)
#define BLK_OPEN_READ		FMODE_READ
#define BLK_OPEN_WRITE		FMODE_WRITE
#endif

/* 6.4: filemap_get_folio() returns an error pointer instead of NULL. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
static inline struct folio *
nbdcow_filemap_get_folio(struct address_space *mapping, pgoff_t index)
{
	struct folio *folio = filemap_get_folio(mapping, index);

	return folio ? folio : ERR_PTR(-ENOENT);
}

#define filemap_get_folio	nbdcow_filemap_get_folio
#endif

/*
 * A page of a tmpfs file for a caller that overwrites it: locked, and if it is new,
 * neither zeroed nor up to date. From 6.12 on shmem_get_folio() can be asked for that.
 */
static inline struct page *
nbdcow_shmem_get_page(struct file *file, pgoff_t index)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
	struct address_space *mapping = file->f_mapping;
	struct page *page;
	void *fsdata;
	int ret = mapping->a_ops->write_begin(file, mapping, (loff_t)index << PAGE_SHIFT,
					      PAGE_SIZE, &page, &fsdata);

	return ret ? ERR_PTR(ret) : page;
#else
	struct folio *folio;
	int ret = shmem_get_folio(file_inode(file), index, 0, &folio, SGP_WRITE);

	return ret ? ERR_PTR(ret) : folio_file_page(folio, index);
#endif
}

/* 6.7: shrinkers are allocated. Returns one that works, or NULL. */
static inline struct shrinker *
nbdcow_shrinker_start(unsigned long (*count)(struct shrinker *shrinker,
					     struct shrink_control *sc),
		      unsigned long (*scan)(struct shrinker *shrinker,
					    struct shrink_control *sc))
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	struct shrinker *shrinker = kzalloc(sizeof(*shrinker), GFP_KERNEL);
#else
	struct shrinker *shrinker = shrinker_alloc(0, "dm-nbdcow");
#endif

	if (!shrinker)
		return NULL;
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->seeks = DEFAULT_SEEKS;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	if (register_shrinker(shrinker, "dm-nbdcow")) {
		kfree(shrinker);
		return NULL;
	}
#else
	shrinker_register(shrinker);
#endif
	return shrinker;
}

static inline void nbdcow_shrinker_stop(struct shrinker *shrinker)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	unregister_shrinker(shrinker);
	kfree(shrinker);
#else
	shrinker_free(shrinker);
#endif
}

/*
 * Properties of the base that we do not share: its alignment, and since they
 * are queue limits (6.11) its volatile write cache, need of stable pages and polling.
 */
static inline void nbdcow_limits_disinherit(struct queue_limits *limits)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	limits->flags &= ~BLK_FLAG_MISALIGNED;
	limits->features &= ~(BLK_FEAT_WRITE_CACHE | BLK_FEAT_FUA |
			      BLK_FEAT_STABLE_WRITES | BLK_FEAT_POLL);
#else
	limits->misaligned = 0;
#endif
	limits->alignment_offset = 0;
	limits->discard_alignment = 0;
}

/*
 * The device-mapper core offers write-zeroes only when all devices below do,
 * which says nothing about a target that does the zeroing itself. Offer it
 * once the core has set its limits.
 */
static inline void nbdcow_offer_write_zeroes(struct request_queue *q,
					     unsigned int max_sectors)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
	blk_queue_max_write_zeroes_sectors(q, max_sectors);
#else
	struct queue_limits limits = queue_limits_start_update(q);

	limits.max_write_zeroes_sectors = max_sectors;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
	limits.max_hw_wzeroes_unmap_sectors = max_sectors;
#endif
	queue_limits_commit_update(q, &limits);
#endif
}

#endif
