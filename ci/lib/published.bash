# The crates that are meant to be published, each before those that depend on it. Sourced.
published=(checked-sync page-pin iommu-type1 vfio-group gvt-scheduler vfio-user-dma vhost-iotlb vfio-dma)

# published_folder CRATE: where it is.
published_folder() {
    if [[ $1 == vfio-dma ]]; then
        echo .
    else
        echo "crates/$1"
    fi
}
