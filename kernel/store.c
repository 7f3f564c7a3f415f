// SPDX-License-Identifier: GPL-2.0-only
/*
 * The tmpfs file behind an overlay: look up, get, copy in, copy out, punch.
 * Getting a page may allocate and sleep; copying never does.
 */
#include <linux/dcache.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/namei.h>
#include <linux/sched/mm.h>

#include "compat.h"
#include "nbdcow.h"

#ifndef CONFIG_TMPFS
#error "tmpfs is where blocks are stored"
#endif

/* Holes cost nothing, so the file is as large as any device may become. */
#define NBDCOW_STORE_BYTES	round_down(MAX_LFS_FILESIZE, (loff_t)PAGE_SIZE)

static pgoff_t block_index(u64 block)
{
	return block >> (PAGE_SHIFT - NBDCOW_BLOCK_SHIFT);
}

/* First byte of a block within its page, where pages are larger than blocks. */
static unsigned int block_offset(u64 block)
{
	return offset_in_page((unsigned long)block << NBDCOW_BLOCK_SHIFT);
}

/**
 * nbdcow_gfp() - how to allocate in the I/O path
 * @context: what may be waited for
 *
 * Never the OOM killer, never the reserves for those who free memory.
 *
 * Context: any.
 * Return: the flags.
 */
gfp_t nbdcow_gfp(enum nbdcow_context context)
{
	gfp_t gfp = __GFP_NOMEMALLOC | __GFP_NOWARN;

	switch (context) {
	case NBDCOW_NOWAIT:
		return gfp | GFP_NOWAIT;
	case NBDCOW_MAP:
		return gfp | GFP_NOIO | __GFP_NORETRY;
	default:
		return gfp | GFP_NOIO | __GFP_RETRY_MAYFAIL;
	}
}

/* What tmpfs is to allocate a page of the file with. */
static gfp_t file_gfp(struct file *file, enum nbdcow_context context)
{
	return nbdcow_gfp(context) | (mapping_gfp_mask(file->f_mapping) &
				      (__GFP_HIGHMEM | __GFP_MOVABLE));
}

/* tmpfs asks for new pages as nbdcow_store_new() would. */
static struct file *set_up_file(struct file *file)
{
	if (IS_ERR(file))
		return file;
	mapping_set_gfp_mask(file->f_mapping, file_gfp(file, NBDCOW_NOWAIT));
	return file;
}

/**
 * nbdcow_store_create() - make the file that holds an overlay's blocks
 * @dir: a directory on the tmpfs mount to use, or NULL for the kernel's own
 * @error: set to a message when it fails
 *
 * Context: process context of whoever creates the device, may sleep.
 * Return: an unlinked, empty file or an ERR_PTR.
 */
struct file *nbdcow_store_create(const char *dir, char **error)
{
	struct file *file;
	struct path path;
	int ret;

	if (!dir) {
		file = shmem_file_setup("dm-nbdcow", NBDCOW_STORE_BYTES,
					mk_vma_flags(VMA_NORESERVE_BIT));
		if (IS_ERR(file))
			*error = "Cannot create the overlay's file";
		return set_up_file(file);
	}

	ret = kern_path(dir, LOOKUP_FOLLOW | LOOKUP_DIRECTORY, &path);
	if (ret) {
		*error = "tmpfs: no such directory";
		return ERR_PTR(ret);
	}
	if (path.mnt->mnt_sb->s_magic != TMPFS_MAGIC) {
		*error = "tmpfs: the directory is not on a tmpfs";
		file = ERR_PTR(-EINVAL);
	} else {
		file = shmem_file_setup_with_mnt(path.mnt, "dm-nbdcow",
						 NBDCOW_STORE_BYTES,
						 mk_vma_flags(VMA_NORESERVE_BIT));
		if (IS_ERR(file))
			*error = "tmpfs: cannot create the overlay's file there";
	}
	path_put(&path);
	return set_up_file(file);
}

/**
 * nbdcow_store_another() - make an empty file on the same mount
 * @file: the file whose mount to use
 *
 * Context: process context, may sleep.
 * Return: the file or an ERR_PTR.
 */
struct file *nbdcow_store_another(struct file *file)
{
	return set_up_file(shmem_file_setup_with_mnt(file->f_path.mnt, "dm-nbdcow",
						NBDCOW_STORE_BYTES,
						mk_vma_flags(VMA_NORESERVE_BIT)));
}

/**
 * nbdcow_store_destroy() - give all pages back at once, then drop the file
 * @file: the file, or NULL
 *
 * Context: process context, may sleep; nobody uses the file any more.
 */
void nbdcow_store_destroy(struct file *file)
{
	unsigned int noio;

	if (!file)
		return;
	/* May read the first block back from swap, while I/O waits for us. */
	noio = memalloc_noio_save();
	shmem_truncate_range(file_inode(file), 0, (loff_t)-1);
	memalloc_noio_restore(noio);
	/* A tmpfs that was mounted for it can be unmounted from now on. */
	if (current->flags & PF_KTHREAD)
		__fput_sync(file);
	else
		fput(file);
}

/* A page that is being migrated to is there before its content. */
static inline struct page *if_usable(struct folio *folio, struct page *page)
{
	if (likely(folio_test_uptodate(folio) && !PageHWPoison(page)))
		return page;
	folio_put(folio);
	return NULL;	/* nbdcow_store_get_locked() will wait, or say -EIO */
}

static struct page *usable_page(struct folio *folio, pgoff_t index)
{
	return if_usable(folio, folio_file_page(folio, index));
}

/*
 * A block's page with a reference, if it is in memory, or NULL. @file is kept alive by
 * RCU or a lock.
 *
 * The page may have been removed from the file by the time this returns, so
 * the caller looks at the block's state afterwards. Taking the reference is a
 * fully ordered atomic: that look cannot come too early.
 */
static struct page *store_find(struct file *file, u64 block)
{
	pgoff_t index = block_index(block);
	struct folio *folio = filemap_get_folio(file->f_mapping, index);

	return IS_ERR(folio) ? NULL : usable_page(folio, index);
}

static noinline void enter_large(struct nbdcow_walk *walk, struct folio *folio,
				 pgoff_t index)
{
	folio_get(folio);
	walk->large = folio;
	walk->large_index = round_down(index, folio_nr_pages(folio));
	/* It stands at the first page, not at ours. */
	xas_reset(&walk->xas);
}

/* Takes a reference for a page in it, or lets go of it. */
static noinline bool stands_in_large(struct nbdcow_walk *walk, pgoff_t index)
{
	if (index - walk->large_index >= folio_nr_pages(walk->large)) {
		nbdcow_store_walk_end(walk);
		return false;
	}
	folio_get(walk->large);
	return true;
}

/**
 * nbdcow_store_walk() - store_find() for one block after the other
 * @walk: where it is, from nbdcow_store_walk_begin()
 * @file: the file it is over
 * @block: the block, best the one after that of the call before
 *
 * What is found may be as old as the walk, not only as the call: a large page is
 * looked up once.
 *
 * Context: under rcu_read_lock() from the first call to nbdcow_store_walk_end().
 * Return: as store_find().
 */
struct page *nbdcow_store_walk(struct nbdcow_walk *walk, struct file *file,
			       u64 block)
{
	struct xa_state *xas = &walk->xas;
	pgoff_t index = block_index(block);
	struct folio *folio;

	if (unlikely(walk->large) && stands_in_large(walk, index))
		return usable_page(walk->large, index);
	if (index != xas->xa_index + 1 || xas->xa_node == XAS_RESTART) {
		xas_set(xas, index);
		folio = xas_load(xas);
	} else {
		folio = xas_next(xas);
	}
	if (!folio || xa_is_value(folio))
		return NULL;
	/* As filemap_get_folio() does, which copes with what is rare. */
	if (unlikely(xa_is_internal(folio) || !folio_try_get(folio))) {
		xas_reset(xas);
		return store_find(file, block);
	}
	if (unlikely(folio != xas_reload(xas))) {
		folio_put(folio);
		xas_reset(xas);
		return store_find(file, block);
	}
	if (unlikely(folio_test_large(folio))) {
		enter_large(walk, folio, index);
		return usable_page(folio, index);
	}
	return if_usable(folio, &folio->page);
}

/**
 * nbdcow_store_lock() - lock a page and make sure that it is still the file's
 * @file: the file
 * @page: a page that store_find() returned
 * @nowait: only try
 *
 * A locked page is neither reclaimed, migrated nor removed.
 *
 * Context: process context, sleeps unless @nowait, but not for I/O.
 * Return: true if locked; else the caller drops its reference and looks again.
 */
bool nbdcow_store_lock(struct file *file, struct page *page, bool nowait)
{
	if (!nowait)
		lock_page(page);
	else if (!trylock_page(page))
		return false;
	if (likely(nbdcow_store_has(file, page) && PageUptodate(page)))
		return true;
	unlock_page(page);
	return false;
}

/**
 * nbdcow_store_get_locked() - find a block's page, or bring it into being
 * @file: the file
 * @block: the block
 * @context: what may be waited for
 * @stored: the block is stored already
 *
 * A new page is zeroed and not yet dirty. The memory comes from whoever is the
 * active memory cgroup; running out of it is an error, never the OOM killer's
 * business.
 *
 * In map() tmpfs must not be asked for a page that may be on swap: it would
 * wait for a bio that is only queued until map() returns. So it is asked there
 * only for blocks of which the file has no trace, and as long as the caller
 * holds off other installers that cannot change.
 *
 * Context: under the block's shard lock, so that nobody removes the page, and
 *	for new blocks under its installer lock; GFP_NOIO.
 * Return: the page, locked and with a reference, or as an ERR_PTR -ENOSPC,
 *	-ENOMEM, -EIO (a broken swap device or memory cell, or tmpfs has lost
 *	the page), -EAGAIN in NBDCOW_NOWAIT, or -EINPROGRESS where only
 *	NBDCOW_WORK can go on.
 */
struct page *nbdcow_store_get_locked(struct file *file, u64 block,
				     enum nbdcow_context context, bool stored)
{
	struct address_space *mapping = file->f_mapping;
	gfp_t gfp = file_gfp(file, context);
	pgoff_t index = block_index(block);
	struct page *page;
	unsigned int noio;
	void *trace;

	/* What is stored must come back, also in a memory cgroup that is full. */
	if (stored)
		gfp |= __GFP_HIGH;

	for (;;) {
		page = store_find(file, block);
		if (!page) {
			trace = xa_load(&mapping->i_pages, index);
			if (trace && context != NBDCOW_WORK)
				return ERR_PTR(-EINPROGRESS);
			/* It is lost; a new page would be zeroes. */
			if (!trace && stored)
				return ERR_PTR(-EIO);
			noio = memalloc_noio_save();
			page = shmem_read_mapping_page_gfp(mapping, index, gfp);
			memalloc_noio_restore(noio);
			if (IS_ERR(page))
				return page;
		}
		if (nbdcow_store_lock(file, page, context == NBDCOW_NOWAIT))
			return page;
		put_page(page);
		if (context == NBDCOW_NOWAIT)
			return ERR_PTR(-EAGAIN);
	}
}

/**
 * nbdcow_store_new() - bring a page into being for a block that is not stored
 * @file: the file
 * @block: the block
 * @context: what may be waited for
 *
 * All of the block is to be written, then nbdcow_store_filled() called: a page that
 * is not zeroed before is had more cheaply, if memory is there for the asking.
 *
 * Context: as for nbdcow_store_get_locked().
 * Return: likewise.
 */
struct page *nbdcow_store_new(struct file *file, u64 block,
			      enum nbdcow_context context)
{
	pgoff_t index = block_index(block);
	unsigned int noio;
	struct page *page;

	/* Something there, in memory or on swap, could mean waiting. */
	if (likely(!xa_load(&file->f_mapping->i_pages, index))) {
		noio = memalloc_noio_save();
		page = nbdcow_shmem_get_page(file, index);
		memalloc_noio_restore(noio);
		if (page != ERR_PTR(-ENOMEM) || context == NBDCOW_NOWAIT)
			return page;
	}
	return nbdcow_store_get_locked(file, block, context, false);
}

/**
 * nbdcow_store_filled() - all of a block is in its page
 * @page: what nbdcow_store_new() returned
 * @block: the block
 *
 * Context: any; under the page lock.
 */
void nbdcow_store_filled(struct page *page, u64 block)
{
	struct folio *folio = page_folio(page);
	size_t start;

	if (!folio_test_uptodate(folio)) {
		start = (folio_page_idx(folio, page) << PAGE_SHIFT) +
			block_offset(block);
		/* Some kernels have done so when they gave it out. */
		if (!want_init_on_alloc(GFP_NOIO))
			folio_zero_segments(folio, 0, start,
					    start + NBDCOW_BLOCK_BYTES,
					    folio_size(folio));
		folio_mark_uptodate(folio);
	}
	folio_mark_dirty(folio);
}

/*
 * Bring a large page on swap back that a range is to cut between two bytes. tmpfs itself
 * would ask for it with GFP_NOWAIT, and some kernels drop the whole of it when they do not
 * get it. Returns whether nothing is on swap there.
 */
static bool bring_back(struct file *file, loff_t before, loff_t after)
{
	struct address_space *mapping = file->f_mapping;
	void *entry = xa_load(&mapping->i_pages, after >> PAGE_SHIFT);
	struct page *page;

	/* Of a large page all indices hold the same. */
	if (!xa_is_value(entry) || before < 0 ||
	    xa_load(&mapping->i_pages, before >> PAGE_SHIFT) != entry)
		return true;
	page = shmem_read_mapping_page_gfp(mapping, after >> PAGE_SHIFT,
					   file_gfp(file, NBDCOW_WORK) | __GFP_HIGH);
	if (IS_ERR(page))
		return false;
	put_page(page);
	return true;
}

/**
 * nbdcow_store_punch() - give the pages of a range of blocks back
 * @file: the file
 * @block: first block
 * @count: number of blocks
 *
 * Without memory to read a page from swap of which only a part is in the range, nothing
 * is given back; what is there is overwritten by the next install.
 *
 * Context: under the range's shard lock for write; sleeps.
 */
void nbdcow_store_punch(struct file *file, u64 block, u64 count)
{
	loff_t start = (loff_t)block << NBDCOW_BLOCK_SHIFT;
	loff_t end = start + ((loff_t)count << NBDCOW_BLOCK_SHIFT);
	unsigned int noio = memalloc_noio_save();

	if (bring_back(file, start - 1, start) && bring_back(file, end - 1, end))
		shmem_truncate_range(file_inode(file), start, end - 1);
	memalloc_noio_restore(noio);
}

/**
 * nbdcow_zero_bio() - fill a part of a read bio with zeroes
 * @bio: the bio
 * @iter: where to begin; advanced
 * @bytes: how many bytes
 *
 * Context: any.
 */
void nbdcow_zero_bio(struct bio *bio, struct bvec_iter *iter,
		     unsigned int bytes)
{
	sector_t end = iter->bi_sector + (bytes >> SECTOR_SHIFT);

	while (bytes) {
		struct bio_vec bv = bio_iter_iovec(bio, *iter);

		bv.bv_len = min(bv.bv_len, bytes);
		memzero_bvec(&bv);
		bvec_iter_advance_single(bio->bi_io_vec, iter, bv.bv_len);
		bytes -= bv.bv_len;
	}
	/* A segment need not be whole sectors; all of them are. */
	iter->bi_sector = end;
}

/**
 * nbdcow_copy_from_page() - copy a stored block's bytes to a read bio
 * @piece: which bytes; its iterator is advanced
 * @page: the block's page
 *
 * Context: any; the caller holds a reference to @page.
 */
void nbdcow_copy_from_page(struct nbdcow_piece *piece, struct page *page)
{
	void *mapped = kmap_local_page(page);
	const void *from = mapped + block_offset(piece->block) + piece->offset;
	unsigned int left = piece->bytes;

	while (left) {
		struct bio_vec bv = bio_iter_iovec(piece->bio, piece->iter);

		bv.bv_len = min(bv.bv_len, left);
		memcpy_to_bvec(&bv, from);
		bvec_iter_advance_single(piece->bio->bi_io_vec, &piece->iter,
					 bv.bv_len);
		from += bv.bv_len;
		left -= bv.bv_len;
	}
	/* Only now: a segment need not be whole sectors. */
	piece->iter.bi_sector += piece->bytes >> SECTOR_SHIFT;
	kunmap_local(mapped);
}

/**
 * nbdcow_copy_to_page() - copy a write bio's bytes to a block's page
 * @piece: which bytes; its iterator is advanced
 * @page: the block's page, which the caller marks dirty afterwards
 *
 * Context: any; the caller holds a reference to @page.
 */
void nbdcow_copy_to_page(struct nbdcow_piece *piece, struct page *page)
{
	void *mapped = kmap_local_page(page);
	void *to = mapped + block_offset(piece->block) + piece->offset;
	unsigned int left = piece->bytes;

	if (unlikely(bio_op(piece->bio) == REQ_OP_WRITE_ZEROES)) {
		memset(to, 0, left);
		piece->iter.bi_size -= left;	/* there are no segments */
		left = 0;
	}
	while (left) {
		struct bio_vec bv = bio_iter_iovec(piece->bio, piece->iter);

		bv.bv_len = min(bv.bv_len, left);
		memcpy_from_bvec(to, &bv);
		bvec_iter_advance_single(piece->bio->bi_io_vec, &piece->iter,
					 bv.bv_len);
		to += bv.bv_len;
		left -= bv.bv_len;
	}
	piece->iter.bi_sector += piece->bytes >> SECTOR_SHIFT;
	kunmap_local(mapped);
}

/**
 * nbdcow_copy_block() - copy a whole block from one file to another
 * @to: its page there, which the caller marks dirty afterwards
 * @from: its page here
 * @block: the block
 *
 * Context: any; under both page locks.
 */
void nbdcow_copy_block(struct page *to, struct page *from, u64 block)
{
	void *target = kmap_local_page(to);
	void *source = kmap_local_page(from);

	memcpy(target + block_offset(block), source + block_offset(block),
	       NBDCOW_BLOCK_BYTES);
	kunmap_local(source);
	kunmap_local(target);
}

/**
 * nbdcow_fill_page() - give a block the bytes that a partial write leaves alone
 * @piece: the write
 * @page: the block's page
 * @content: the whole block as it was, or NULL for zeroes
 *
 * Context: any; under the page lock.
 */
void nbdcow_fill_page(const struct nbdcow_piece *piece, struct page *page,
		      const void *content)
{
	void *mapped = kmap_local_page(page);
	void *to = mapped + block_offset(piece->block);

	if (content)
		memcpy(to, content, NBDCOW_BLOCK_BYTES);
	else
		memset(to, 0, NBDCOW_BLOCK_BYTES);
	kunmap_local(mapped);
}
